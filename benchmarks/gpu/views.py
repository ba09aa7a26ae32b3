"""Views of images that lie on the device, made there by torch: what the checks train on where DALI is not installed.

The draws and the colours are the trainer's own; crop, blur and mirror follow trainer/data/pipeline.py, so that the views
differ from DALI's by rounding (the part `dali` says by how much).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.augment import crop_box, draw_view
from trainer.data.colour import colour
from trainer.data.views import Batch, ViewSpec


class Views:
    """An endless stream of batches, a function of (seed, step); the interface of trainer.data.loader.Loader.

    Args:
        images: uint8 [N, 3, H, W] on the device, H and W at most the size of the views: there is no antialiasing.
        label: int64 [N].
        views, batch_size, seed, mean, std: as for the Loader.
        step: where to begin.
    """

    def __init__(
        self,
        images: Tensor,
        label: Tensor,
        views: Sequence[ViewSpec],
        *,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        step: int = 0,
    ) -> None:
        self.images, self.label, self.views, self.batch_size, self.seed = images, label, views, batch_size, seed
        self.mean, self.std, self.step = mean, std, step
        self.steps_per_epoch = len(images) // batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, step = divmod(self.step, self.steps_per_epoch)
        order = _order(len(self.images), self.seed, epoch)
        index = torch.from_numpy(order[step * self.batch_size : (step + 1) * self.batch_size])
        chosen = self.images[index.to(self.images.device)]
        views, draws = {}, {}
        for view in self.views:
            drawn = draw_view(view, seed=self.seed, step=self.step, rank=0, batch_size=self.batch_size, world_size=1)
            views[view.name], draws[view.name] = make(chosen, view, drawn, self.mean, self.std), drawn
        self.step += 1
        return Batch(views, index, self.label[index], draws)


@lru_cache(maxsize=1)
def _order(images: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(images)


def make(images: Tensor, view: ViewSpec, drawn: dict[str, np.ndarray], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The views [count, B, 3, size, size] of images uint8 [B, 3, H, W] for draws [count, B, ...]."""
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in drawn.items()}
    pixels = augmented(images.repeat(view.count, 1, 1, 1), flat, view.size)
    return colour(pixels, flat, mean, std).unflatten(0, (view.count, -1))


def augmented(images: Tensor, drawn: dict[str, np.ndarray], size: int) -> Tensor:
    """Crop, blur and mirror: uint8 [N, 3, H, W] to uint8 [N, 3, size, size]."""
    box = torch.from_numpy(crop_box(drawn["extent"], drawn["anchor"], *images.shape[2:])).to(images.device)
    top, left, bottom, right = box.T
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 2] = (right - left) * (1 - 2 * _on(drawn["flip"], images)), left + right - 1
    theta[:, 1, 1], theta[:, 1, 2] = bottom - top, top + bottom - 1
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    x = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round()
    return _blurred(x, _on(drawn["sigma"], images), 2 * (size // 20) + 1).round().clamp(0, 255).byte()


def _blurred(x: Tensor, sigma: Tensor, width: int) -> Tensor:
    """A Gaussian of each image's own width; sigma 0 is none."""
    reach = width // 2
    offset = torch.arange(-reach, reach + 1, device=x.device)
    weight = torch.exp(-offset.square() / (2 * sigma[:, None].clamp_min(1e-3).square()))
    weight = (weight / weight.sum(1, keepdim=True)).T[..., None, None, None]
    for axis, pad in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        wide, size = F.pad(x, pad, mode="reflect"), x.shape[axis]
        x = sum(weight[k] * wide.narrow(axis, k, size) for k in range(width))
    return x


def _on(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)

"""Rotation and elastic transform of a batch of views: what the graph cropped and mirrored is turned, then bent, in one go.

In torch and not in DALI, which has no elastic transform on a CPU; the same on both devices. Against torchvision:

- Rotation and elastic transform together interpolate once (there: twice), bilinearly (RandomRotation's default: nearest).
- A view is cut from a crop with room to turn, so that its corners do not tell the angle (docs/views.md). `corners: zero` is
  torchvision's fill.
- The displacement of the elastic transform is drawn as its lowest cosine modes and not as noise to be blurred. Its
  covariance is that of ElasticTransform(sigma=5); only towards the border, where that mirrors the noise without its last
  pixel, the variance differs by up to 6 %.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.config import Augmentation

SIGMA = 5.0  # pixels over which the displacement varies: torchvision's default
CACHED = 1 << 18  # values at a time, which stay in the cache of a CPU core


def warp(pixels: Tensor, drawn: dict[str, np.ndarray], augmentation: Augmentation | None, size: int) -> Tensor:
    """One copy of a view, turned and bent by its draws.

    Args:
        pixels: uint8 [N, 3, P, P] in 0..255, P pixels as `canvas` says.
        drawn: angle [N] and, if the augmentation is elastic, field [N, 2, k, k] of `augment.draw`.
        augmentation: of this copy.
        size: S, height and width of the view.

    Returns: float32 [N, 3, S, S]; the pixels themselves if the augmentation neither turns nor bends.
    """
    a = augmentation
    if a is None or not (a.rotation or a.elastic):
        return pixels
    angle = torch.from_numpy(drawn["angle"]).to(pixels.device)
    field = torch.from_numpy(drawn["field"]).to(pixels.device) if a.elastic else None
    rows = max(1, CACHED // pixels[0].numel()) if pixels.device.type == "cpu" else len(pixels)
    result = torch.empty(len(pixels), 3, size, size, device=pixels.device)
    for first in range(0, len(pixels), rows):
        part = slice(first, first + rows)
        q = _centres(size, pixels.device)
        if field is not None:
            q = q + displacement(field[part], a.elastic_alpha, size) * (2 / size)
        grid = _turned(q, angle[part], reach(a))
        beyond = "zeros" if a.corners == "zero" else "reflection"
        result[part] = F.grid_sample(pixels[part].float(), grid, padding_mode=beyond, align_corners=False)
        if field is not None and a.corners == "zero":  # what the rotation brought beyond the border is not seen either
            result[part] *= (q.abs() < 1 + 1 / size).all(1, keepdim=True)
    return result


def displacement(field: Tensor, alpha: float, size: int) -> Tensor:
    """Where the pixels of an elastic transform are read, relative to where they are shown.

    Args:
        field: amplitudes of cosine modes, [N, 2 (x, y), k (down), k (across)], as `augment.draw` draws them.
        alpha: strength; torchvision's displacement is alpha / size in units of half the image.
        size: height and width of the view.

    Returns: pixels, [N, 2 (x, y), size, size].
    """
    basis = torch.from_numpy(_basis(size)).to(field)
    return basis @ field @ (0.5 * alpha * basis.T)


def modes(size: int) -> int:
    """How many cosine modes a side the displacement of a view has: all but 2e-5 of the variance."""
    return min(size, math.ceil(3 * size / (math.pi * SIGMA)) + 1)


def reach(augmentation: Augmentation | None) -> float:
    """How much wider the crop is than the view that turns inside it: a matter of the settings.

    It depends on the largest angle, not on the one drawn, or else the size of the view would tell the angle.
    """
    if augmentation is None or augmentation.corners != "inscribed":
        return 1.0
    widest = math.radians(min(augmentation.rotation, 45.0))
    return math.cos(widest) + math.sin(widest)


def canvas(augmentation: Augmentation | None, size: int) -> int:
    """Height and width in pixels of what the graph makes for a view of this size."""
    return math.ceil(reach(augmentation) * size)


@lru_cache
def _basis(size: int) -> np.ndarray:
    """Orthonormal cosines (DCT-II) times the transfer function of the Gaussian, float32 [size, modes]."""
    m = np.arange(modes(size))
    cosines = np.cos(np.pi * m * (np.arange(size)[:, None] + 0.5) / size) * np.sqrt(np.where(m, 2, 1) / size)
    basis: np.ndarray = (cosines * np.exp(-((SIGMA * np.pi * m / size) ** 2) / 2)).astype(np.float32)
    return basis


def _centres(size: int, device: torch.device) -> Tensor:
    """Centres of the pixels, [1, 2 (x, y), size, size] in -1..1."""
    line = (2 * torch.arange(size, device=device) + 1) / size - 1
    return torch.stack(torch.meshgrid(line, line, indexing="xy"))[None]


def _turned(q: Tensor, angle: Tensor, reach: float) -> Tensor:
    """Where the points [N or 1, 2, S, S] of views turned counter-clockwise lie in the unturned crop, [N, S, S, 2]."""
    radians = torch.deg2rad(angle)[:, None, None]
    cosine, sine = torch.cos(radians) / reach, torch.sin(radians) / reach
    x, y = q.unbind(1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)

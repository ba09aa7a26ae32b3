"""The colours of a batch of views, from its draws: brightness, contrast, saturation with hue and grayscale, solarisation.

In torch and not in DALI, whose operator for saturation and hue alone takes four times as long on a CPU as all of this (32
pixels). The order is fixed (torchvision's ColorJitter shuffles the four); each step clamps. Against torchvision, op by op:

- Brightness, contrast (about the mean luma of the crop), saturation, grayscale and solarisation are the same.
- Hue turns the chroma of YIQ, so that it is one linear map with saturation, the same for every pixel and every image of a
  group; there it shifts the angle of HSV. For shifts within +-0.1 turns the two differ by 4.5 of 255 on average on CIFAR-10,
  where ours moves a pixel by 4.5 and torchvision's by 3.4.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CACHED = 1 << 18  # values at a time, which stay in the cache of a CPU core
THRESHOLD = 128  # of solarisation

YIQ = np.array([[0.299, 0.587, 0.114], [0.59590059, -0.27455667, -0.32134392], [0.21153661, -0.52273617, 0.31119955]])
LUMA = np.tile(YIQ[0], (3, 1))
QUARTER_TURN = np.linalg.inv(YIQ) @ [[0, 0, 0], [0, 0, 1], [0, -1, 0]] @ YIQ  # of the chroma; the luma is left out


def colour(pixels: Tensor, drawn: dict[str, np.ndarray], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Views as the network takes them.

    Args:
        pixels: in 0..255, uint8 or float32 (these are overwritten) [N, 3, H, W].
        drawn: brightness, contrast, saturation, hue, gray, solarize of `augment.draw`, each [N]; empty for none of them.
        mean, std: of the channels, of 1.

    Returns: normalised, float32 [N, 3, H, W].
    """
    scale = 1 / torch.tensor(std, device=pixels.device)[:, None, None]
    offset = -scale * torch.tensor(mean, device=pixels.device)[:, None, None]
    factors = [torch.from_numpy(value).to(pixels.device) for value in _factors(drawn)]
    inverted = None
    if drawn and drawn["solarize"].any():
        inverted = torch.from_numpy(drawn["solarize"]).to(pixels.device)[:, None, None, None]
    rows = max(1, CACHED // pixels[0].numel()) if pixels.device.type == "cpu" else len(pixels)
    result = torch.empty(pixels.shape, device=pixels.device)
    for first in range(0, len(pixels), rows):
        part = slice(first, first + rows)
        x = pixels[part].float()
        if factors:
            x = _jittered(x, *(value[part] for value in factors))
        if inverted is not None:
            x = torch.where(inverted[part] & (x >= THRESHOLD), 255 - x, x)
        torch.mul(x, scale / 255, out=result[part]).add_(offset)
    return result


def _factors(drawn: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Brightness and contrast [N, 1, 1, 1], and the linear map of saturation, hue and grayscale [N, 3, 3]."""
    if not drawn:
        return []
    brightness, contrast = (drawn[name][:, None, None, None] for name in ("brightness", "contrast"))
    saturation = np.where(drawn["gray"], 0, drawn["saturation"])[:, None, None]
    angle = 2 * np.pi * drawn["hue"][:, None, None]
    maps = LUMA + saturation * (np.cos(angle) * (np.eye(3) - LUMA) + np.sin(angle) * QUARTER_TURN)
    return [brightness, contrast, maps.astype(np.float32)]


def _jittered(x: Tensor, brightness: Tensor, contrast: Tensor, maps: Tensor) -> Tensor:
    """Pixels of 255 [N, 3, H, W] after the three steps; overwrites x."""
    x.mul_(brightness).clamp_(0, 255)
    luma = (x.mean((2, 3)) @ torch.from_numpy(YIQ[0]).to(x))[:, None, None, None]
    x.mul_(contrast).add_((1 - contrast) * luma).clamp_(0, 255)
    return torch.bmm(maps, x.flatten(2)).view_as(x).clamp_(0, 255)

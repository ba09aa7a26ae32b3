"""Teachers: exponential moving averages of what is trained."""

import copy
import math

import torch
from torch import Tensor, nn


class Momentum(nn.Module):
    """A copy of a module that follows it and gets no gradient (He et al. 2020, eq. 2).

    Buffers are the copy's own: its BatchNorms see what the teacher sees. It has no stochastic depth.

    Args:
        source: the module to follow; copied as it is now.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(source).requires_grad_(False)
        for part in self.module.modules():
            if hasattr(part, "drop_prob"):  # timm's DropPath
                part.drop_prob = 0.0  # type: ignore[assignment]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The teacher's output."""
        out: Tensor = self.module(x)
        return out

    @torch.no_grad()
    def follow(self, source: nn.Module, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * source."""
        torch._foreach_lerp_(list(self.module.parameters()), list(source.parameters()), 1 - momentum)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at 1: the schedule of momentum (Grill et al. 2020, sec. 3.3)."""
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2

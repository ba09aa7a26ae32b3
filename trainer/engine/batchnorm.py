"""BatchNorm over all ranks: timm's conversion on the GPU, and the same function on the CPU, where torch has none."""

from typing import TypeVar

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.engine.world import gather_rows, world_size

M = TypeVar("M", bound=nn.Module)


def synchronise_batchnorm(module: M, device: torch.device) -> M:
    """Make every BatchNorm of `module` take its training statistics over all ranks."""
    if device.type == "cuda":
        return convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.__class__ = type(f"Sync{type(child).__name__}", (_SyncForward, type(child)), {})
    return module


class _SyncForward:
    """The forward of a BatchNorm whose ranks hold equal numbers of rows; then the activation that timm's may carry."""

    def forward(self: _BatchNorm, x: Tensor) -> Tensor:  # type: ignore[misc]
        if not self.training or world_size() == 1:
            return super().forward(x)  # type: ignore[misc]
        wide = x if x.dtype == torch.float64 else x.float()
        axes = [0, *range(2, x.dim())]
        variances, means = torch.var_mean(wide, axes, correction=0)
        variances, means = gather_rows(torch.stack([variances, means])[None]).unbind(1)  # a row for every rank
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        count = world_size() * x.numel() / x.shape[1]
        _track(self, mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        shift = (0 if self.bias is None else self.bias) - mean * scale
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)
        for follower in ("drop", "act"):  # of timm's BatchNormAct2d
            y = getattr(self, follower, nn.Identity())(y)
        return y


@torch.no_grad()
def _track(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics towards those of the joint batch."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    rate = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), rate)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), rate)

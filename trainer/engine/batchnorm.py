"""BatchNorm over all ranks: torch's on the GPU, and the same function on the CPU, where torch has none."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.engine.world import world_size


def synchronise_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of `module` take its training statistics over all ranks."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.__class__ = type(f"Sync{type(child).__name__}", (_SyncForward, type(child)), {})
    return module


class _SyncForward:
    """The forward of a BatchNorm whose ranks hold equal numbers of rows."""

    def forward(self: _BatchNorm, x: Tensor) -> Tensor:  # type: ignore[misc]
        if not self.training or world_size() == 1:
            return super().forward(x)  # type: ignore[misc]
        axes = [0, *range(2, x.dim())]
        moments = _SumOverRanks.apply(torch.stack([x.mean(axes), x.square().mean(axes)])) / world_size()
        mean, variance = moments[0], moments[1] - moments[0].square()
        count = world_size() * x.numel() / x.shape[1]
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                rate = self.momentum or 1.0
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), rate)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.view(shape).to(x.dtype) + (self.bias - mean * scale).view(shape).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient

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
            return super(_SyncForward, self).forward(x)  # type: ignore[misc]
        axes = [0, *range(2, x.dim())]
        moments = _SumOverRanks.apply(torch.stack([x.mean(axes), x.square().mean(axes)])) / world_size()
        mean, variance = moments[0], moments[1] - moments[0].square()
        count = world_size() * x.numel() / x.shape[1]
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.view(shape).to(x.dtype) + (self.bias - mean * scale).view(shape).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient

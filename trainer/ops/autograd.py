"""Autograd for operators that compute their gradient along with their value."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


class _Once(torch.autograd.Function):
    """The gradient, depending on the input as autograd sees it, so that a second derivative is refused and not taken for 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, point: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError("care's operators have first derivatives only: found a second one asked for (create_graph)")


def differentiate_once(op: CustomOpDef, value: int, gradients: Sequence[int]) -> None:
    """Register autograd and autocast of an operator that returns gradients.

    Args:
        op: its float32 arithmetic is kept in autocast.
        value: which output may be differentiated; a scalar or one number a group.
        gradients: outputs that are the gradients of the value's sum by the first inputs, in order; unread if none is asked for.
    """
    count = len(gradients)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:count], *(output[i] for i in gradients))
        ctx.mark_non_differentiable(*(x for i, x in enumerate(output) if i != value))
        ctx.others = len(inputs) - count

    def scale(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        points, slopes = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        weights = (upstream[value].reshape(upstream[value].shape + (1,) * (s.ndim - upstream[value].ndim)) for s in slopes)
        scaled = (_Once.apply(w * s, p) for w, s, p in zip(weights, slopes, points, strict=True))
        return *scaled, *(None,) * ctx.others

    op.register_autograd(scale, setup_context=keep)
    for device in ("cpu", "cuda"):
        op.register_autocast(device, torch.float32)

"""The Gram term on the GPU: one program keeps the difference of a group's Gram matrices, for its loss and its gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PRECISION = tl.constexpr("tf32x3")  # float32's accuracy on tensor cores


@triton.jit(do_not_specialize=["images"])
def gram_kernel(
    z1, z2, loss, slope1, slope2, images, factor,
    d: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Sum of squares of K1 - K2 = sym(D S^T) off the diagonal, D = z1 - z2, S = z1 + z2; `factor` scales the gradient."""
    group = tl.program_id(0)
    row, column = tl.arange(0, N), tl.arange(0, BK)
    at = (group * images + row)[:, None] * d + column[None, :]
    cross = tl.zeros((N, N), tl.float32)
    for k in range(0, d, BK):
        inside = (row[:, None] < images) & (k + column[None, :] < d)
        a, b = tl.load(z1 + at + k, mask=inside, other=0.0), tl.load(z2 + at + k, mask=inside, other=0.0)
        cross = tl.dot(a - b, tl.trans(a + b), cross, input_precision=PRECISION)
    difference = tl.where(row[:, None] == row[None, :], 0.0, (cross + tl.trans(cross)) / 2)
    tl.store(loss + group, tl.sum(difference * difference))
    if GRADIENT:
        for k in range(0, d, BK):
            inside = (row[:, None] < images) & (k + column[None, :] < d)
            a, b = tl.load(z1 + at + k, mask=inside, other=0.0), tl.load(z2 + at + k, mask=inside, other=0.0)
            tl.store(slope1 + at + k, tl.dot(difference, a, input_precision=PRECISION) * factor, mask=inside)
            tl.store(slope2 + at + k, tl.dot(difference, b, input_precision=PRECISION) * -factor, mask=inside)


def gram_equivariance_fused(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """The Gram term by the kernel; the formulas are those of `gram_equivariance_batched`.

    Args:
        z: both views, float32 [2, G, n, d], n at most 64.
        gradient: whether it is wanted.

    Returns: loss, and its gradient [2, G, n, d], empty unless wanted.
    """
    z1, z2 = z.contiguous()
    groups, images, d = z1.shape
    pairs = groups * images * (images - 1)
    losses, slope = z.new_empty(groups), z.new_empty(z.shape if gradient else 0)
    slope1, slope2 = slope if gradient else (slope, slope)
    n = max(16, triton.next_power_of_2(images))
    with torch.cuda.device_of(z):
        gram_kernel[(groups,)](
            z1, z2, losses, slope1, slope2, images, 4 / pairs, d=d, N=n, BK=32, GRADIENT=gradient, num_warps=4, num_stages=2
        )
    return losses.sum() / pairs, slope

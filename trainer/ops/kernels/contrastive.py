"""NT-Xent on the GPU: tiles of logits that are made, used and forgotten, once for the loss and once for its gradient.

Both kernels see z [2, N, d] as 2N rows, view by view. Every output belongs to one program: results do not vary from run to
run. Products are tf32x3: float32's accuracy on tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PRECISION = tl.constexpr("tf32x3")
MASKED = tl.constexpr(-1e30)
TILES = {"BM": 64, "BN": 64, "BK": 32}  # of 4 warps: the gradient kernel has no register to spare


@triton.jit
def _views(first, low, width, images, B: tl.constexpr):
    """Image and row in z of B consecutive ones among both views of `width` images from `low`; image -1 past their end."""
    k = first + tl.arange(0, B)
    view = (k >= width).to(tl.int32)
    image = low + k - view * width
    return tl.where(k < 2 * width, image, -1), view * images + image


@triton.jit
def _load(z, row, image, first, d: tl.constexpr, B: tl.constexpr):
    """Columns first .. first + B of rows of z; zero where there are none."""
    column = first + tl.arange(0, B)
    return tl.load(z + row[:, None] * d + column[None, :], mask=(image[:, None] >= 0) & (column[None, :] < d), other=0.0)


@triton.jit
def _logits(z, own_row, own_image, row, image, scale, d: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Inner products of a tile's views times `scale`, and where they are of different images."""
    logits = tl.zeros((BM, BN), tl.float32)
    for k in range(0, d, BK):
        own, other = _load(z, own_row, own_image, k, d, BK), _load(z, row, image, k, d, BK)
        logits = tl.dot(own, tl.trans(other), logits, input_precision=PRECISION)
    return logits * scale, (image[None, :] >= 0) & (image[None, :] != own_image[:, None])


@triton.jit(do_not_specialize=["images", "start", "count"])
def negatives_kernel(
    z, out, images, start, count, scale, d: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Log-sum-exp over the views of all other images, for BM of both views of `count` images from `start`.

    The maximum goes along with the sum: at temperature 1e-3 exponentials span more than float32 does.
    """
    own_image, own_row = _views(tl.program_id(0) * BM, start, count, images, BM)
    top = tl.full((BM,), MASKED, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for first in range(0, 2 * images, BN):
        image, row = _views(first, 0, images, images, BN)
        logits, differ = _logits(z, own_row, own_image, row, image, scale, d, BM, BN, BK)
        logits = tl.where(differ, logits, MASKED)
        higher = tl.maximum(top, tl.max(logits, 1))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    tl.store(out + tl.program_id(0) * BM + tl.arange(0, BM), top + tl.log(mass), mask=own_image >= 0)


@triton.jit(do_not_specialize=["images", "start", "count"])
def gradient_kernel(
    z, total, wrong, out, images, start, count, scale, factor,
    d: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows i of the gradient, D columns of them: sum over j of (p_ij + p_ji) z_j, minus what draws i to its partner.

    `total` [2N] is the log-sum-exp over all other views, infinite for a view that is not classified, so that its p is 0;
    `wrong` [2N] is 1 - p of the partner. A tile without classified views has p_ji only: it visits the classified.
    """
    own_image, own_row = _views(tl.program_id(0) * BM, 0, images, images, BM)
    own_total = tl.load(total + own_row, mask=own_image >= 0, other=float("inf"))
    classified = tl.max(((own_image >= start) & (own_image < start + count)).to(tl.int32), 0) > 0
    low, width = tl.where(classified, 0, start), tl.where(classified, images, count)
    column = tl.program_id(1) * D
    slope = tl.zeros((BM, D), tl.float32)
    for first in range(0, 2 * width, BN):
        image, row = _views(first, low, width, images, BN)
        logits, differ = _logits(z, own_row, own_image, row, image, scale, d, BM, BN, BK)
        their_total = tl.load(total + row, mask=image >= 0, other=float("inf"))
        weights = tl.exp(logits - own_total[:, None]) + tl.exp(logits - their_total[None, :])
        weights = tl.where(differ, weights, 0.0)
        slope = tl.dot(weights, _load(z, row, image, column, d, D), slope, input_precision=PRECISION)
    partner = tl.where(own_row < images, own_row + images, own_row - images)
    draw = tl.load(wrong + own_row, mask=own_image >= 0, other=0.0) + tl.load(wrong + partner, mask=own_image >= 0, other=0.0)
    slope = (slope - draw[:, None] * _load(z, partner, own_image, column, d, D)) * factor
    columns = column + tl.arange(0, D)
    stored = (own_image[:, None] >= 0) & (columns[None, :] < d)
    tl.store(out + own_row[:, None] * d + columns[None, :], slope, mask=stored)


def nt_xent_fused(z: Tensor, temperature: float, start: int, stop: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """NT-Xent by the kernels; the formulas are those of `nt_xent_chunked`.

    Args:
        z: both views, float32 [2, N, d].
        temperature, start, stop, gradient: see `nt_xent`.

    Returns: loss, and its gradient [2, N, d], empty unless wanted.
    """
    z = z.contiguous()
    images, d, count, rows = z.shape[1], z.shape[2], stop - start, slice(start, stop)
    negatives = z.new_empty(2, count)
    tiles = triton.cdiv(2 * count, TILES["BM"])
    with torch.cuda.device_of(z):
        negatives_kernel[(tiles,)](z, negatives, images, start, count, 1 / temperature, d, **TILES, num_warps=4, num_stages=2)
    positives = (z[0, rows] * z[1, rows]).sum(1) / temperature
    x = negatives - positives
    loss = torch.logaddexp(x, x.new_zeros(())).mean()
    if not gradient:
        return loss, z.new_empty(0)
    total, wrong, slope = z.new_full((2, images), torch.inf), z.new_zeros(2, images), torch.empty_like(z)
    total[:, rows], wrong[:, rows] = torch.logaddexp(negatives, positives), x.sigmoid()
    columns = min(128, max(16, triton.next_power_of_2(d)))
    grid = triton.cdiv(2 * images, TILES["BM"]), triton.cdiv(d, columns)
    scales = 1 / temperature, 1 / (2 * count * temperature)
    with torch.cuda.device_of(z):
        gradient_kernel[grid](
            z, total, wrong, slope, images, start, count, *scales, d, columns, **TILES, num_warps=4, num_stages=1
        )
    return loss, slope

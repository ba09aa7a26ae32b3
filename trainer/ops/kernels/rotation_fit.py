"""The rotation fit of fewer points than dimensions as one Triton kernel: a program is a group, from points to gradients.

The same steps as `rotation_fit.iterate`, which says what they are; here nothing but the result leaves the chip.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.ops.polar import schedule
from trainer.ops.rotation_fit import RESOLUTION, ROUNDING, Fit

EPS = tl.constexpr(torch.finfo(torch.float32).eps)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
ROUNDING = tl.constexpr(ROUNDING)

PRECISION = "tf32x3"  # three tf32 products: float32's accuracy at the speed of tensor cores
CHUNK = 32  # dimensions in registers at a time; more, or more than 4 warps, spills


def fits(source: Tensor) -> bool:
    """Whether groups [G, n, d] are this kernel's: n <= 64 and n < d."""
    return source.shape[1] <= 64 and source.shape[1] < source.shape[2]


def fit(source: Tensor, target: Tensor, proper: bool) -> Fit:
    """Fit float32 groups for which `fits`; as n < d, O(d) and SO(d) leave the same residual."""
    del proper
    source, target = source.contiguous(), target.contiguous()
    groups, points, dim = source.shape
    coefficients, split, end = _coefficients(source.device)
    residual, nuclear, gauge = (source.new_empty(groups) for _ in range(3))
    gradients = torch.empty_like(source), torch.empty_like(target)
    with torch.cuda.device_of(source):
        fit_kernel[(groups,)](
            source, target, *gradients, residual, nuclear, gauge, coefficients, points, dim, split, end,
            ROWS=max(16, triton.next_power_of_2(points)), CHUNK=CHUNK, PRECISION=PRECISION, num_warps=4, num_stages=1,
        )  # fmt: skip
    return Fit(None, residual, nuclear, gauge, *gradients)


@cache
def _coefficients(device: torch.device) -> tuple[Tensor, int, int]:
    """The steps of both iterations in a row, where the second begins, and where it ends."""
    points, core = (schedule(resolution) for resolution in RESOLUTION[torch.float32])
    return torch.tensor(points + core, dtype=torch.float32, device=device), len(points), len(points) + len(core)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _on_span(given, factor, points, dim, ROWS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Points A by their coordinates in the rows of P, A P^T [n, n]."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, CHUNK)[None, :]
    mixed = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    tl.debug_barrier()
    for start in range(0, dim, CHUNK):
        at, inside = row * dim + start + column, (row < points) & (start + column < dim)
        x = tl.load(factor + at, mask=inside, other=0.0)
        mixed += _dot(tl.load(given + at, mask=inside, other=0.0), tl.trans(x), PRECISION)
    return mixed


@triton.jit
def _split(
    given, factor, coefficients, steps, points, dim, ROWS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Write the polar factor P [n, d] of points A; return A P^T and how many directions P misses.

    `factor` is worked on in place, chunk by chunk of its columns; each pass makes the Gram matrix that the next one needs.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, CHUNK)[None, :]
    gram = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for start in range(0, dim, CHUNK):
        at, inside = row * dim + start + column, (row < points) & (start + column < dim)
        x = tl.load(given + at, mask=inside, other=0.0)
        tl.store(factor + at, x, mask=inside)
        gram += _dot(x, tl.trans(x), PRECISION)
    norm = 1.0001 * tl.sqrt(tl.sqrt(tl.sum(gram * gram)))
    shrink = 1.0 / tl.maximum(norm, 1e-30)
    gram = gram * shrink * shrink  # in this order: the square of 1e30 is not finite
    for step in range(steps):
        tl.debug_barrier()
        a, b = tl.load(coefficients + 2 * step) * shrink, tl.load(coefficients + 2 * step + 1) * shrink
        shrink = 1.0
        following = tl.zeros((ROWS, ROWS), dtype=tl.float32)
        for start in range(0, dim, CHUNK):
            at, inside = row * dim + start + column, (row < points) & (start + column < dim)
            x = tl.load(factor + at, mask=inside, other=0.0)
            x = a * x + b * _dot(gram, x, PRECISION)
            tl.debug_barrier()  # threads store other elements than they loaded
            tl.store(factor + at, x, mask=inside)
            following += _dot(x, tl.trans(x), PRECISION)
        gram = following
    trace = tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :], gram, 0.0))
    mixed = _on_span(given, factor, points, dim, ROWS, CHUNK, PRECISION)
    return mixed, tl.maximum(points * (1 - EPS) - trace, 0.0)


@triton.jit
def _polar(x, coefficients, first, last, points, PRECISION: tl.constexpr):
    """The polar factor of an n x n matrix, and how many directions it misses."""
    gram = _dot(x, tl.trans(x), PRECISION)
    norm = 1.0001 * tl.sqrt(tl.sqrt(tl.sum(gram * gram)))
    x = x / tl.maximum(norm, 1e-30)
    for step in range(first, last):
        a, b = tl.load(coefficients + 2 * step), tl.load(coefficients + 2 * step + 1)
        x = a * x + b * _dot(_dot(x, tl.trans(x), PRECISION), x, PRECISION)
    return x, tl.maximum(points * (1 - EPS) - tl.sum(x * x), 0.0)


@triton.jit
def _gradient(
    given, factor, mix, points, dim, ROWS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Replace the polar factor P of points A by 2 (A - mix P); return ||A||^2 and ||mix P||^2."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, CHUNK)[None, :]
    scale = tl.zeros((ROWS,), dtype=tl.float32)
    kept = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, dim, CHUNK):
        at, inside = row * dim + start + column, (row < points) & (start + column < dim)
        fitted = _dot(mix, tl.load(factor + at, mask=inside, other=0.0), PRECISION)
        kept += tl.sum(fitted * fitted, 1)
        x = tl.load(given + at, mask=inside, other=0.0)
        scale += tl.sum(x * x, 1)
        tl.debug_barrier()  # as in _split
        tl.store(factor + at, 2 * (x - fitted), mask=inside)
    return tl.sum(scale), tl.sum(kept)


@triton.jit
def fit_kernel(
    source, target, source_gradient, target_gradient, residual, nuclear, gauge, coefficients, points, dim, split, end,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One group. The memory of the gradients holds the polar factors until the end."""
    group = tl.program_id(0).to(tl.int64)
    source += group * points * dim
    target += group * points * dim
    source_gradient += group * points * dim
    target_gradient += group * points * dim
    a, missing = _split(source, source_gradient, coefficients, split, points, dim, ROWS, CHUNK, PRECISION)
    b, lacking = _split(target, target_gradient, coefficients, split, points, dim, ROWS, CHUNK, PRECISION)
    missing += lacking
    turn, lacking = _polar(_dot(tl.trans(a), b, PRECISION), coefficients, split, end, points, PRECISION)
    if ROWS == 64:  # again, as registers have no room for them meanwhile
        a = _on_span(source, source_gradient, points, dim, ROWS, CHUNK, PRECISION)
        b = _on_span(target, target_gradient, points, dim, ROWS, CHUNK, PRECISION)
    turned = _dot(a, turn, PRECISION)
    found = tl.sum((turned - b) * (turned - b))
    tl.store(residual + group, found)
    tl.store(nuclear + group, tl.sum(turned * b))
    back = _dot(b, tl.trans(turn), PRECISION)
    source_scale, source_kept = _gradient(source, source_gradient, back, points, dim, ROWS, CHUNK, PRECISION)
    target_scale, target_kept = _gradient(target, target_gradient, turned, points, dim, ROWS, CHUNK, PRECISION)
    scale, kept = source_scale + target_scale, source_kept + target_kept
    shift = tl.sqrt((missing + lacking) * (tl.abs(scale - kept) + ROUNDING * EPS * scale))
    rounding = tl.sqrt(scale) * ROUNDING * EPS
    error = 2 * tl.sqrt(found) * (shift + rounding * tl.rsqrt(points * 1.0)) + (shift + rounding) * (shift + rounding)
    tl.store(gauge + group, error / tl.maximum(tl.maximum(found, scale * EPS * EPS), TINY))

"""The rotation that carries one set of points onto another, for many sets at once (orthogonal Procrustes, Wahba, Kabsch)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.ops.polar import polar

TOLERANCE = 1e-5  # relative error of a residual that is accepted; a group that may exceed it is fitted again in float64
RESOLUTION_POINTS, RESOLUTION_CORE = 1e-3, 1e-5  # relative singular values that the iteration resolves
ROUNDING = 5.0  # of the points, in units of their type; over k directions it averages to 1 / sqrt(k) (measured)
MISSING = 1e-4  # directions that the polar factor lacks; fewer are rounding


class RotationFit(NamedTuple):
    """The best rotation of every group.

    Args:
        rotation: R [G, d, d], source @ R ~ target; None where it was not asked for.
        residual: ||source @ R - target||_F^2, [G]; carries the gradient to both arguments.
        nuclear: tr(R^T source^T target), [G]: the sum of the singular values of source^T target, the smallest negative
            where a reflection would fit better.
        gauge: estimated error of the residual relative to it, [G], or to what rounding leaves of an exact fit; at most
            `TOLERANCE` but for groups that float64 fits no better.
    """

    rotation: Tensor | None
    residual: Tensor
    nuclear: Tensor
    gauge: Tensor


def fit_rotation(source: Tensor, target: Tensor, *, group: Literal["SO", "O"] = "SO", rotation: bool = True) -> RotationFit:
    """Minimise ||source_g @ R_g - target_g||_F over the rotations (or all orthogonal maps) of every group g.

    The residual is differentiable once, by the envelope theorem: 2 (A - B R^T) and 2 (B - A R), without a derivative of R
    and therefore finite everywhere. On points that leave directions free (n < d, duplicates, collapse) R is the fit on the
    span and the smallest turn beyond it; the gradient is then one of the valid subgradients.

    The GPU fits by matrix products (for n <= 64 and n < d in one fused kernel), the CPU by QR and a small SVD; groups whose
    gauge exceeds `TOLERANCE`, and reflections, are fitted again in float64. To ask which, the host waits for the GPU.

    Args:
        source, target: A and B, [G, n, d]; float32, float64, or half types, which are computed in float32.
        group: "SO", rotations only, or "O", reflections too.
        rotation: return R, which only the CPU's route makes, on the GPU too: leave it out in training.

    Raises:
        ValueError: shapes that differ or are not [G, n, d].
    """
    if source.shape != target.shape or source.ndim != 3 or 0 in source.shape[1:]:
        raise ValueError(
            f"source {tuple(source.shape)} and target {tuple(target.shape)} must both be [groups, points, dimensions]"
        )
    dtype = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    source, target = source.to(dtype), target.to(dtype)
    gradients = torch.is_grad_enabled() and (source.requires_grad or target.requires_grad)
    turn, residual, nuclear, gauge, _, _ = _fit(source, target, group == "SO", gradients, rotation)
    return RotationFit(turn if rotation else None, residual, nuclear, gauge)


def rotation_equivariance(z1: Tensor, z2: Tensor, groups: int) -> Tensor:
    """Mean squared distance that is left between z1 and z2 when the best orthogonal map of every group is taken out.

    CARE's Wahba error (sec. 5) as a training term: zero exactly where the Gram term is, and like it blind to reflections.

    Args:
        z1, z2: unit-norm embeddings, [B, d]; B divisible by `groups`, group g in consecutive rows.
        groups: number of groups.

    Returns: scalar, float32 or float64.
    """
    source, target = (z.unflatten(0, (groups, -1)) for z in (z1, z2))
    return fit_rotation(source, target, group="O", rotation=False).residual.mean() / source.shape[1]


@torch.library.custom_op("care::fit_rotation", mutates_args=())
def _fit(
    source: Tensor, target: Tensor, proper: bool, gradients: bool, rotation: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rotation, residual, nuclear, gauge, and the residual's gradients; empty what was not asked for."""
    with _whole_products():
        fit = _route(source, rotation)(source, target, proper)
        doubtful = ~(fit.gauge <= TOLERANCE)
        if source.dtype != torch.float64 and doubtful.any():
            again = factorise(source[doubtful].double(), target[doubtful].double(), proper, rotation)
            for part, better in zip(fit, again, strict=True):
                if part is not None and better is not None:
                    part[doubtful] = better.to(part.dtype)
    gradient = (fit.source_gradient, fit.target_gradient) if gradients else (source.new_empty(0), source.new_empty(0))
    return source.new_empty(0) if fit.rotation is None else fit.rotation, fit.residual, fit.nuclear, fit.gauge, *gradient


@_fit.register_fake
def _(source: Tensor, target: Tensor, proper: bool, gradients: bool, rotation: bool) -> tuple[Tensor, ...]:
    groups, points, dim = source.shape
    scalar, gradient = (groups,), (groups, points, dim) if gradients else (0,)
    shapes = ((groups, dim, dim) if rotation else (0,), scalar, scalar, scalar, gradient, gradient)
    return tuple(source.new_empty(shape) for shape in shapes)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(output[0], *output[2:])


def _backward(ctx, _rotation, residual, *_):  # type: ignore[no-untyped-def]
    return *(residual[:, None, None] * gradient for gradient in ctx.saved_tensors), None, None, None


_fit.register_autograd(_backward, setup_context=_remember)
for device in ("cpu", "cuda"):  # in autocast's bfloat16 no fit would pass its gauge, which does not know of it
    _fit.register_autocast(device, torch.float32)


@contextmanager
def _whole_products() -> Iterator[None]:
    """Multiply float32 in float32 though the program may allow TF32 or bfloat16: the gauge counts on it."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


class Fit(NamedTuple):
    """What a route gives: see `RotationFit`; and the gradients of the residual, [G, n, d]."""

    rotation: Tensor | None
    residual: Tensor
    nuclear: Tensor
    gauge: Tensor
    source_gradient: Tensor
    target_gradient: Tensor


def _route(source: Tensor, rotation: bool) -> Callable[..., Fit]:
    """What serves a group of this size on this device best (benchmarks/rotation_fit.py)."""
    if rotation or source.device.type == "cpu" or source.dtype == torch.float64:
        return partial(factorise, rotation=rotation)
    from trainer.ops.kernels import rotation_fit as fused  # Triton is not everywhere

    return fused.fit if fused.fits(source) else iterate


def factorise(source: Tensor, target: Tensor, proper: bool, rotation: bool) -> Fit:
    """By QR to the span of the points and an SVD there; a group that is not finite gives nan."""
    finite = (source.sum((1, 2)) + target.sum((1, 2))).isfinite()
    if not finite.all():  # LAPACK refuses all for one
        source, target = (torch.where(finite[:, None, None], points, 0) for points in (source, target))
    spanned = source.shape[1] < source.shape[2]
    if spanned:
        (qa, ra), (qb, rb) = torch.linalg.qr(source.mT), torch.linalg.qr(target.mT)
        a, b, bases = ra.mT, rb.mT, (qa.mT, qb.mT)
    else:
        a, b, bases = source, target, None
    u, s, vh = torch.linalg.svd(a.mT @ b)
    if proper and not spanned:  # with more dimensions than points, one outside the span takes the reflection at no cost
        flip = torch.ones_like(s)
        flip[:, -1] = torch.where(torch.linalg.det(u) * torch.linalg.det(vh) < 0, -1, 1)
        u, s = u * flip[:, None], s * flip
    residual, scale, gradients = _evaluate(source, target, a, b, u @ vh, bases)
    gauge = _gauge(residual, scale, 2 * _unresolved(s), torch.zeros_like(scale), s.shape[1])
    poison = torch.where(finite, 0.0, torch.nan).to(s.dtype)
    turn = None
    if rotation:
        left, right = (u, vh.mT) if bases is None else (bases[0].mT @ u, bases[1].mT @ vh.mT)
        turn = _complete(left, right, s, proper) + poison[:, None, None]
    scalars = (value + poison for value in (residual, s.sum(dim=1), gauge))
    return Fit(turn, *scalars, *(g + poison[:, None, None] for g in gradients))


def iterate(source: Tensor, target: Tensor, proper: bool) -> Fit:
    """By matrix products alone, for the GPU; without the rotation.

    With fewer points than dimensions the points are split first, A = a P with the polar factor P [n, d]; an n x n fit is left.
    """
    a, b, bases, split = source, target, None, torch.zeros_like(source[:, 0, 0])
    if source.shape[1] < source.shape[2]:
        left, right = polar(source, RESOLUTION_POINTS), polar(target, RESOLUTION_POINTS)
        a, b, bases = source @ left.factor.mT, target @ right.factor.mT, (left.factor, right.factor)
        split = left.error + right.error
    core = a.mT @ b
    fit = polar(core, RESOLUTION_CORE)
    residual, scale, gradients = _evaluate(source, target, a, b, fit.factor, bases)
    lost = (a.square().sum((1, 2)) - (a @ fit.factor).square().sum((1, 2))).abs() * (fit.missing > MISSING)
    gauge = _gauge(residual, scale, 2 * fit.error + lost, split, core.shape[1])
    if proper and bases is None:
        gauge = torch.where(torch.linalg.det(fit.factor) < 0, torch.inf, gauge)  # a reflection: factorise knows what it costs
    return Fit(None, residual, (core * fit.factor).sum((1, 2)), gauge, *gradients)


def _evaluate(
    source: Tensor, target: Tensor, a: Tensor, b: Tensor, turn: Tensor, bases: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Residual, ||A||^2 + ||B||^2 and the residual's gradients, for A = a bases[0], B = b bases[1], a turned onto b.

    The residual is summed from the differences: as ||A||^2 + ||B||^2 - 2 nuclear it would cancel where the fit is good.
    """
    turned = a @ turn
    residual = (turned - b).square().sum((1, 2))
    scale = a.square().sum((1, 2)) + b.square().sum((1, 2))
    back, forth = ((b, turn.mT), (a, turn)) if bases is None else ((b @ turn.mT, bases[0]), (turned, bases[1]))
    gradients = [torch.baddbmm(x, *fitted, beta=2, alpha=-2) for x, fitted in ((source, back), (target, forth))]
    return residual, scale, gradients


def _noise(s: Tensor) -> Tensor:
    """The singular value, [G, 1], that rounding alone may make of 0; s [G, k] in descending order."""
    return 4 * torch.finfo(s.dtype).eps * s[:, :1].abs()


def _unresolved(s: Tensor) -> Tensor:
    """What the rounding of M costs its nuclear norm, [G], estimated from its singular values [G, k] in descending order.

    A rounding error e turns the direction of s_i by e / s_i, which costs s_i times its square; but never more than the
    direction is worth.
    """
    turned = _noise(s).square() / s.abs().clamp_min(torch.finfo(s.dtype).tiny)
    return torch.minimum(s.abs(), turned).sum(dim=1)


def _gauge(residual: Tensor, scale: Tensor, turn: Tensor, shift: Tensor, directions: int) -> Tensor:
    """Relative error of the residual.

    The root of a residual moves by no more than the points do, and rounding moves them too.

    Args:
        scale: ||A||^2 + ||B||^2, [G].
        turn: what the error of the turn costs, [G].
        shift: how far the points that were fitted are from those given, [G].
        directions: min(n, d).
    """
    kind = torch.finfo(residual.dtype)
    rounding = ROUNDING * kind.eps * scale.sqrt()
    error = turn + 2 * residual.sqrt() * (shift + rounding / directions**0.5) + (shift + rounding).square()
    return error / residual.maximum(kind.eps**2 * scale).clamp_min(kind.tiny)


def _complete(left: Tensor, right: Tensor, s: Tensor, proper: bool) -> Tensor:
    """The orthogonal map, [G, d, d], that carries left_i to right_i where s_i counts, and turns least elsewhere.

    Off the span of `left` this is the direct rotation (Davis & Kahan 1970) of one complement onto the other: with
    left^T right = O H, the row x goes to x - x right (1 + H)^-1 (left O + right)^T. It equals
    polar(G + (1 - G G^T)(1 - G^T G)), G = left right^T, at the cost of k x k problems.

    Args:
        left, right: orthonormal columns, [G, d, k].
        s: their singular values, [G, k].
        proper: make the determinant 1, by a reflection off the span where there is room.
    """
    eps, dim = torch.finfo(s.dtype).eps, left.shape[1]
    counts = s.abs() > _noise(s)
    left, right = left * counts[:, None], right * counts[:, None]
    if left.shape[2] == dim and counts.all():
        return left @ right.mT
    overlap, identity = left.mT @ right, torch.eye(dim, dtype=s.dtype, device=s.device)
    # A direction that does not count gets the singular value 2, above all cosines, and so mixes with none.
    u, cosine, vh = torch.linalg.svd(overlap + torch.diag_embed(2.0 * ~counts).to(s.dtype))
    middle = (left @ u + right @ vh.mT) / (1 + cosine)[:, None]
    rotation = torch.baddbmm(identity, left, (right - left).mT)
    rotation.baddbmm_(right - left @ overlap, (middle @ vh).mT, alpha=-1)
    if proper:  # the direct rotation is proper; what is left decides
        free, longest = (1 - left.square().sum(dim=2)).max(dim=1)
        improper = (torch.linalg.det(u) * torch.linalg.det(vh) < 0) & (counts.sum(dim=1) < dim)
        axis = identity[longest, :, None] - left @ left[torch.arange(len(left)), longest, :, None]
        mirror = axis * (improper / free.clamp_min(eps))[:, None, None]
        rotation.baddbmm_(mirror, axis.mT @ rotation, alpha=-2)
    return rotation

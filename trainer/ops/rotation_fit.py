"""The rotation that carries one set of points onto another, for many sets at once (orthogonal Procrustes, Wahba, Kabsch)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.ops.autograd import differentiate_once
from trainer.ops.polar import polar

TOLERANCE = 1e-5  # relative error of a residual that is accepted; a group that may exceed it is fitted again in float64
GRADIENT_TOLERANCE = 1e-4  # the same of its gradients
TINY = torch.finfo(torch.float32).tiny
RESOLUTION = {  # smallest relative singular values of points, and of their n x n fit, that the iteration resolves
    torch.float32: (1e-3, 3e-3),  # smaller ones it could, but rounding turns their directions by more than gradients bear
    torch.float64: (1e-6, 1e-11),
}
ROUNDING = 5.0  # of the points, in units of their type; over k directions it averages to 1 / sqrt(k) (measured)


class RotationFit(NamedTuple):
    """The best rotation of every group.

    Args:
        rotation: R [G, d, d], source @ R ~ target; None where it was not asked for.
        residual: ||source @ R - target||_F^2, [G]; carries the gradient to both arguments.
        nuclear: tr(R^T source^T target), [G]: the sum of the singular values of source^T target, the smallest negative
            where a reflection would fit better.
        gauge: estimated error of the residual relative to it, or to what rounding leaves of an exact fit, or a tenth of the
            gradients' where that is more, [G]; at most `TOLERANCE` but for groups that float64 fits no better.
    """

    rotation: Tensor | None
    residual: Tensor
    nuclear: Tensor
    gauge: Tensor


def fit_rotation(source: Tensor, target: Tensor, *, group: Literal["SO", "O"] = "SO", rotation: bool = True) -> RotationFit:
    """Minimise ||source_g @ R_g - target_g||_F over the rotations (or all orthogonal maps) of every group g.

    The residual is differentiable once, by the envelope theorem: 2 (A - B R^T) and 2 (B - A R), without a derivative of R
    and therefore finite everywhere; a second derivative raises NotImplementedError. On points that leave directions free
    (n < d, duplicates, collapse) R is the fit on the span and the smallest turn beyond it; the gradient is then one of the
    valid subgradients.

    The GPU fits by matrix products (for n <= 64 and n < d in one fused kernel), the CPU by QR and a small SVD. Groups whose
    gauge exceeds `TOLERANCE`, and reflections, are fitted again in float64: on the GPU by matrix products first, and by
    SVD what even these leave in doubt. To ask which, the host waits for the GPU.

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
        first, *others = routes(source, rotation)
        fit = first(source, target, proper)
        for route in others:
            doubtful = ~(fit.gauge <= TOLERANCE)
            if not doubtful.any():
                break
            again = route(source[doubtful].double(), target[doubtful].double(), proper)
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


# In autocast's bfloat16 no fit would pass its gauge, which does not know of it.
differentiate_once(_fit, value=1, gradients=[4, 5])


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


def routes(source: Tensor, rotation: bool) -> list[Callable[..., Fit]]:
    """What serves groups like these best (benchmarks/rotation_fit.py), then what fits those in doubt, in float64."""
    exact, single = partial(factorise, rotation=rotation), source.dtype == torch.float32
    if rotation or source.device.type == "cpu":
        return [exact, exact] if single else [exact]
    if not single:
        return [iterate, exact]
    from trainer.ops.kernels import rotation_fit as fused  # Triton is not everywhere

    return [fused.fit if fused.fits(source) else iterate, iterate, exact]


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
    gauge = _gauge(residual, scale, torch.zeros_like(scale), s.shape[1], turn=2 * _unresolved(s))
    weights = (a @ u).square().sum(1) + (b @ vh.mT).square().sum(1)
    steep = _swing(s, weights, spanned) / residual.sqrt().maximum(torch.finfo(s.dtype).eps * scale.sqrt() + TINY)
    gauge = gauge.maximum(steep * TOLERANCE / GRADIENT_TOLERANCE)
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
    (fine, finer), missing = RESOLUTION[source.dtype], torch.zeros_like(source[:, 0, 0])
    a, b, bases = source, target, None
    if source.shape[1] < source.shape[2]:
        left, right = polar(source, fine), polar(target, fine)
        a, b, bases = source @ left.factor.mT, target @ right.factor.mT, (left.factor, right.factor)
        missing = left.missing + right.missing
    core = a.mT @ b
    turn, lacking = polar(core, finer)
    residual, scale, gradients = _evaluate(source, target, a, b, turn, bases)
    kept = sum((x - g / 2).square().sum((1, 2)) for x, g in zip((source, target), gradients, strict=True))
    lost = (scale - kept).abs() + ROUNDING * torch.finfo(scale.dtype).eps * scale
    # A direction of weight w that keeps x is moved by (1 - x) w and loses (1 - x^2) w^2, so by Cauchy and Schwarz:
    gauge = _gauge(residual, scale, ((missing + lacking) * lost).sqrt(), core.shape[1])
    if proper and bases is None:
        gauge = torch.where(torch.linalg.det(turn) < 0, torch.inf, gauge)  # a reflection: factorise knows what it costs
    return Fit(None, residual, (core * turn).sum((1, 2)), gauge, *gradients)


def _evaluate(
    source: Tensor, target: Tensor, a: Tensor, b: Tensor, turn: Tensor, bases: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Residual, ||A||^2 + ||B||^2 and the residual's gradients, for A = a bases[0], B = b bases[1], a turned onto b.

    The residual is summed from the differences: as ||A||^2 + ||B||^2 - 2 nuclear it would cancel where the fit is good.
    """
    turned = a @ turn
    residual = (turned - b).square().sum((1, 2))
    scale = source.square().sum((1, 2)) + target.square().sum((1, 2))
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


def _swing(s: Tensor, weights: Tensor, spanned: bool) -> Tensor:
    """What the rounding of M moves the turned points by, and so half of a gradient, [G].

    Args:
        s: singular values of M, descending, the last negative where a reflection would fit better, [G, k].
        weights: squared size of the points in their directions, [G, k].
        spanned: whether there are dimensions beyond these; otherwise a direction can only turn into another.
    """
    other = torch.cat([s[:, -1:].expand_as(s[:, 1:]), s[:, -2:][:, :1]], 1)  # the smallest but s_i
    gap = s if spanned else (s + other).abs()
    turned = (torch.finfo(s.dtype).eps * s[:, :1].abs() / gap.clamp_min(TINY)).clamp_max(1)
    return (weights * torch.where(s.abs() <= _noise(s), 1, turned).square()).sum(1).sqrt()


def _gauge(residual: Tensor, scale: Tensor, shift: Tensor, directions: int, turn: float | Tensor = 0.0) -> Tensor:
    """Relative error of the residual.

    The root of a residual moves by no more than the points do, and rounding moves them too. By as much, relative to the
    root, a shift moves the gradients: where the gauge accepts it, they are closer than they need be.

    Args:
        scale: ||A||^2 + ||B||^2, [G].
        shift: how far the fit carries the points from where it should, [G].
        directions: min(n, d).
        turn: what the error of an orthogonal turn costs, [G].
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

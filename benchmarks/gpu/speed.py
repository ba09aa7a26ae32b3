"""Speed of the ops with gradients, against their rivals and against the ceilings of the machine."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.gpu.measure import peak_bytes, seconds
from benchmarks.gpu.ops import gram_formula, nt_xent_formula
from benchmarks.gpu.part import Check, Row, part

SIZES = [  # groups, points, dimensions, noise relative to the points
    (1024, 32, 128, 0.3), (1024, 32, 128, 0.03), (1024, 16, 128, 0.3), (256, 64, 128, 0.3), (64, 128, 128, 0.3),
]  # fmt: skip
SVD_GROUPS = 64  # a host loop over matrices: its time is proportional to them


@part(limit_s=240)
def rotation_fit_speed(check: Check) -> Iterator[Row]:
    """fit_rotation with gradients: ms, share of groups fitted again, times as fast as its rivals, share of the floor."""
    from trainer.ops.rotation_fit import fit_rotation, iterate

    for groups, points, dim, noise in [(4, 8, 16, 0.3), (4, 8, 16, 0.03)] if check.small else SIZES:
        a = torch.randn(groups, points, dim, device=check.device)
        b = a + noise * torch.randn_like(a)
        leaves, few = (a.clone().requires_grad_(), b.clone().requires_grad_()), min(groups, SVD_GROUPS)

        def ours(leaves: tuple[Tensor, Tensor] = leaves) -> object:
            return torch.autograd.grad(fit_rotation(*leaves, rotation=False).residual.sum(), leaves)

        spent, peak = seconds(ours, check.device), peak_bytes(ours, check.device)
        rivals = {
            "matmul loop": seconds(partial(iterate, a, b, True), check.device),
            "eigh polar": seconds(partial(eigh_fit, a, b), check.device),
            "svd": seconds(partial(torch.linalg.svd, a[:few].mT @ b[:few]), check.device) * groups / few,
        }
        row = {"G,n,d": f"{groups},{points},{dim}", "noise": noise, "ms": 1e3 * spent, "refitted": refitted(a, b)}
        row |= {f"x {k}": s / spent for k, s in rivals.items()}
        floor = fit_floor(check, groups, points, dim)
        yield row | {"of floor": floor and floor / spent, "peak MiB": peak and peak / 2**20}


def fit_floor(check: Check, groups: int, points: int, dim: int) -> float | None:
    """Seconds at the ceilings: products at a third of the tf32 rate (three make a float32 one), or inputs and gradients copied.

    Flops: 108 n^2 d + 76 n^3 for n < d, else those of the d x d iteration, 160 MF at n = d = 128 (the fit's notes).
    """
    tf32, copy = check.ceiling("tf32"), check.ceiling("copy")
    if tf32 is None or copy is None:
        return None
    flops = 108 * points**2 * dim + 76 * points**3 if points < dim else 76 * dim**3
    return groups * max(3 * flops / tf32, 4 * 4 * points * dim / copy)


def refitted(a: Tensor, b: Tensor) -> float:
    """Share of groups whose first fit, without rotation, leaves its gauge in doubt: they are fitted again in float64."""
    from trainer.ops.rotation_fit import TOLERANCE, routes

    first, *others = routes(a, rotation=False)
    return 1 - float((first(a, b, False).gauge <= TOLERANCE).float().mean()) if others else 0.0


def eigh_fit(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual and both gradients, polar factors by eigenvalues; on the span of the points where these are fewer than d."""

    def polar(m: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(m @ m.mT)
        return (vectors * values.clamp_min(1e-12).rsqrt()[:, None]) @ (vectors.mT @ m)

    left, right = (polar(a), polar(b)) if a.shape[1] < a.shape[2] else (None, None)
    small_a, small_b = (a, b) if left is None else (a @ left.mT, b @ right.mT)
    turn = polar(small_a.mT @ small_b)
    forth, back = small_a @ turn, small_b @ turn.mT
    residual = (forth - small_b).square().sum((1, 2))
    if left is not None:
        forth, back = forth @ right, back @ left
    return residual, 2 * (a - back), 2 * (b - forth)


@part(limit_s=180)
def losses_speed(check: Check) -> Iterator[Row]:
    """nt_xent and gram_equivariance, forward and backward: ms, times as fast as their formulas, memory beyond the inputs."""
    from trainer.ops.contrastive import nt_xent
    from trainer.ops.gram import gram_equivariance

    for n in [64] if check.small else [4096, 16384, 65536]:
        ours, formula = (lambda a, b, f=f: f(a, b, 0.2) for f in (nt_xent, nt_xent_formula))
        row = _timed(check, "nt_xent", ours, formula if n <= 16384 else None, n)  # beyond, the logits take 64 GiB
        asked = check.device.type == "cuda" and n == 65536
        yield row | ({"ok": row["peak MiB"] < 512} if asked else {})
    for n, groups in [(64, 4)] if check.small else [(4096, 256), (16384, 16)]:
        ours, formula = (lambda a, b, f=f, g=groups: f(a, b, g) for f in (gram_equivariance, gram_formula))
        yield _timed(check, f"gram, {groups} groups", ours, formula, n)


def _timed(check: Check, name: str, ours: Callable, formula: Callable | None, n: int) -> Row:
    z = normalize(torch.randn(2, n, 128, device=check.device), dim=2)
    a, b = z.clone().requires_grad_(True).unbind()

    def step(f: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(a, b), (a, b))

    spent, peak = seconds(step(ours), check.device), peak_bytes(step(ours), check.device)
    row = {"op": name, "N": n, "ms": 1e3 * spent, "peak MiB": peak and peak / 2**20, "x formula": None, "its peak MiB": None}
    if formula:
        peak = peak_bytes(step(formula), check.device)
        row |= {"x formula": seconds(step(formula), check.device) / spent, "its peak MiB": peak and peak / 2**20}
    return row

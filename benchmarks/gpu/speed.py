"""Speed of the ops with gradients, against their rivals and against the ceilings of the machine."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.gpu.measure import peak_bytes, seconds
from benchmarks.gpu.ops import gram_formula, nt_xent_formula
from benchmarks.gpu.part import Check, Row, part

SIZES = [(1024, 32, 128), (1024, 16, 128), (256, 64, 128), (64, 128, 128)]
SVD_GROUPS = 64  # a host loop over matrices: its time is proportional to them


@part(limit_s=240)
def rotation_fit_speed(check: Check) -> Iterator[Row]:
    """fit_rotation with gradients: ms, times as fast as its rivals, and its share of the machine's floor for the same work."""
    from trainer.ops.rotation_fit import fit_rotation, iterate

    for groups, points, dim in [(4, 8, 16)] if check.small else SIZES:
        a = torch.randn(groups, points, dim, device=check.device)
        b = a + 0.3 * torch.randn_like(a)
        leaves, few = (a.clone().requires_grad_(), b.clone().requires_grad_()), min(groups, SVD_GROUPS)

        def ours(leaves: tuple[Tensor, Tensor] = leaves) -> object:
            return torch.autograd.grad(fit_rotation(*leaves, rotation=False).residual.sum(), leaves)

        spent, peak = seconds(ours, check.device), peak_bytes(ours, check.device)
        rivals = {
            "matmul loop": seconds(partial(iterate, a, b, True), check.device),
            "eigh polar": seconds(partial(eigh_fit, a, b), check.device),
            "svd": seconds(partial(torch.linalg.svd, a[:few].mT @ b[:few]), check.device) * groups / few,
        }
        row = {"G,n,d": f"{groups},{points},{dim}", "ms": 1e3 * spent} | {f"x {k}": s / spent for k, s in rivals.items()}
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


def eigh_fit(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients, with polar factors by eigenvalues; with fewer points than dimensions on the span of the points."""

    def polar(m: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(m @ m.mT)
        return (vectors * values.clamp_min(1e-12).rsqrt()[:, None]) @ (vectors.mT @ m)

    if a.shape[1] < a.shape[2]:
        left, right = polar(a), polar(b)
        core_a, core_b = a @ left.mT, b @ right.mT
        turn = polar(core_a.mT @ core_b)
        return 2 * (a - core_b @ turn.mT @ left), 2 * (b - core_a @ turn @ right)
    turn = polar(a.mT @ b)
    return 2 * (a - b @ turn.mT), 2 * (b - a @ turn)


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

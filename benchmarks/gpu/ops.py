"""The objective's ops against their definitions in float64 on the CPU: values, gradients, unwritten memory, determinism."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.gpu.measure import error, exact, poisoned
from benchmarks.gpu.part import Check, Row, part

Op = Callable[[Tensor, Tensor], Tensor]

VALUE, GRADIENT = 1e-5, 1e-4  # relative, float32: sums of thousands of terms; a gradient is a difference of near numbers


@dataclass(frozen=True)
class Case:
    """Groups of points [G, n, d], and the relative errors allowed.

    Args:
        resolved: gradients are compared in the directions of singular values of A^T B above this, relative to the largest;
            in others they are not unique, even in float64.
    """

    source: Tensor
    target: Tensor
    proper: bool = True
    value: float = VALUE
    gradient: float = GRADIENT
    resolved: float = 0.0


@part(limit_s=150, gpu=False)
def rotation_fit(check: Check) -> Iterator[Row]:
    """fit_rotation against an SVD in float64, by relative error; "attained" is the residual of the rotation it returns."""
    from trainer.ops.rotation_fit import fit_rotation

    for name, case in rotation_cases(check.small).items():
        group = "SO" if case.proper else "O"
        reference = partial(procrustes, proper=case.proper)
        row = judge(partial(_residual, group=group), reference, case.source, case.target, check.device, axes(case))
        turn = fit_rotation(case.source.to(check.device), case.target.to(check.device), group=group).rotation.double().cpu()
        a, b = case.source.double(), case.target.double()
        row["attained"] = error((a @ turn - b).square().sum((1, 2)), reference(a, b))
        row["orthogonal"] = float((turn @ turn.mT - torch.eye(turn.shape[1])).abs().max())
        row["det"] = float(torch.linalg.det(turn).min())
        ok = row["value"] <= case.value and row["gradient"] <= case.gradient and row["repeats"]
        ok = ok and row["attained"] <= 1e-3 and row["orthogonal"] <= 1e-5 and (not case.proper or row["det"] > 0.99)
        yield {"case": name, "group": group, "shape": "x".join(map(str, case.source.shape)), **row, "ok": ok}


@part(limit_s=120, gpu=False)
def losses(check: Check) -> Iterator[Row]:
    """nt_xent and gram_equivariance against their formulas in float64, by relative error."""
    for name, (op, reference, z1, z2) in loss_cases(check.small).items():
        row = judge(op, reference, z1, z2, check.device)
        yield {"case": name, **row, "ok": row["value"] <= VALUE and row["gradient"] <= GRADIENT and row["repeats"]}


@part(limit_s=240, gpu=False)
def compiled(check: Check) -> Iterator[Row]:
    """The same inside torch.compile(fullgraph=True), value and gradients."""
    backend = "aot_eager" if check.small else "inductor"
    random = rotation_cases(check.small)["random"]
    cases = {"fit_rotation": (partial(_residual, group="SO"), partial(procrustes, proper=True), random.source, random.target)}
    cases |= {f"{name}, one of each": case for name, case in loss_cases(small=True).items() if "first" in name}
    for name, (op, reference, first, second) in cases.items():
        torch._dynamo.reset()
        whole = torch.compile(lambda a, b, op=op: 2 * op(a, b), fullgraph=True, backend=backend)
        row = judge(whole, lambda a, b, r=reference: 2 * r(a, b), first, second, check.device)
        yield {"op": name, "backend": backend, **row, "ok": row["value"] <= VALUE and row["gradient"] <= GRADIENT}


def axes(case: Case) -> tuple[Tensor, Tensor]:
    """The directions of source and target that decide on the fit, [G, d, d]; 0 in place of those that do not."""
    u, s, vh = torch.linalg.svd(case.source.double().mT @ case.target.double())
    counts = torch.ones_like(s) if case.resolved == 0 else (s > case.resolved * s[:, :1]).double()
    return u * counts[:, None], vh.mT * counts[:, None]


def judge(
    op: Op, reference: Op, first: Tensor, second: Tensor, device: torch.device, axes: tuple[Tensor, Tensor] | None = None
) -> Row:
    """Errors of value and gradient (along `axes`) in poisoned memory, and whether two more runs agree to the bit."""
    expected, wanted = _run(reference, first.double(), second.double())
    first, second = first.to(device), second.to(device)
    with exact():
        with poisoned():
            value, gradients = _run(op, first, second)
        runs = [_run(op, first, second) for _ in range(2)]
    repeats = all(torch.equal(a, b) for a, b in zip((runs[0][0], *runs[0][1]), (runs[1][0], *runs[1][1]), strict=True))
    slopes = [[g.double().cpu() for g in parts] for parts in (gradients, wanted)]
    if axes:
        slopes = [[g @ along for g, along in zip(parts, axes, strict=True)] for parts in slopes]
    flat, flat_wanted = (torch.cat([g.flatten() for g in parts]) for parts in slopes)
    return {"value": error(value, expected), "gradient": error(flat, flat_wanted), "repeats": repeats}


def _run(op: Op, first: Tensor, second: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value and both gradients; the entries of a vector weigh differently, so that none can stand for another."""
    first, second = (x.detach().clone().requires_grad_() for x in (first, second))
    value = op(first, second)
    weight = torch.linspace(1, 2, max(2, value.numel()), dtype=value.dtype, device=value.device)[: value.numel()]
    return value.detach(), torch.autograd.grad((value.flatten() * weight).sum(), (first, second))


def _residual(source: Tensor, target: Tensor, group: str) -> Tensor:
    from trainer.ops.rotation_fit import fit_rotation

    return fit_rotation(source, target, group=group, rotation=False).residual


def procrustes(source: Tensor, target: Tensor, proper: bool) -> Tensor:
    """Residuals [G] of the orthogonal Procrustes problem by SVD (Schoenemann 1966; Kabsch 1976 for rotations)."""
    with torch.no_grad():  # the envelope theorem: the best R counts as a constant
        u, _, vh = torch.linalg.svd(source.mT @ target)
        sign = torch.ones_like(u[:, 0])
        if proper:
            sign[:, -1] = torch.sign(torch.linalg.det(u @ vh))
        turn = (u * sign[:, None]) @ vh
    return (source @ turn - target).square().sum((1, 2))


def nt_xent_formula(z1: Tensor, z2: Tensor, temperature: float, rows: slice = slice(None)) -> Tensor:
    """Chen et al. 2020, eq. 1, all logits at once."""
    n = len(z1)
    everyone, index = torch.cat([z1, z2]), torch.arange(2 * n, device=z1.device)
    logits = (everyone @ everyone.T / temperature).fill_diagonal_(-torch.inf)
    chosen = torch.cat([index[:n][rows], index[n:][rows]])
    return cross_entropy(logits[chosen], (chosen + n) % (2 * n))


def gram_formula(z1: Tensor, z2: Tensor, groups: int) -> Tensor:
    """CARE, sec. 3: the mean over ordered pairs of different images of one group."""
    a, b = (z.unflatten(0, (groups, -1)) for z in (z1, z2))
    images = a.shape[1]
    apart = (a @ a.mT - b @ b.mT).square() * (1 - torch.eye(images, dtype=z1.dtype, device=z1.device))
    return apart.sum() / (groups * images * (images - 1))


def rotation_formula(z1: Tensor, z2: Tensor, groups: int) -> Tensor:
    """What the best orthogonal map of every group leaves, a mean over images."""
    a, b = (z.unflatten(0, (groups, -1)) for z in (z1, z2))
    return procrustes(a, b, proper=False).mean() / a.shape[1]


def rotation_cases(small: bool) -> dict[str, Case]:
    """Fresh points, turned and moved a little; easy, hard, and with directions that no point decides on."""
    g, f64 = 3 if small else 64, torch.float64

    def points(n: int, d: int, groups: int = g) -> Tensor:
        return torch.randn(groups, n, d, dtype=f64) / d**0.5

    def case(a: Tensor, noise: float = 0.3, flip: bool = False, **options) -> Case:
        turn = torch.linalg.qr(torch.randn(len(a), a.shape[2], a.shape[2], dtype=f64)).Q
        turn[:, 0] *= torch.sign(torch.linalg.det(turn))[:, None] * (-1 if flip else 1)
        return Case(a.float(), (a @ turn + noise * points(*a.shape[1:], len(a))).float(), **options)

    def steep(a: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(a, full_matrices=False)
        return u * torch.logspace(0, -8, u.shape[-1], dtype=f64) @ vh

    def repeated(distinct: int) -> Case:
        a, b = (points(distinct, 128).repeat(1, 32 // distinct, 1).float() for _ in range(2))
        return Case(a, b, resolved=1e-10)

    near = {"gradient": 1e-3}
    random = case(points(32, 128))
    return {
        "random": random,
        "bfloat16": Case(random.source.bfloat16(), random.target.bfloat16(), gradient=5e-3),  # so are its gradients
        "random, many groups": case(points(32, 128, 4 if small else 1024)),
        "n = 1": case(points(1, 128)),
        "n = 16": case(points(16, 128), proper=False),
        "n = 64": case(points(64, 128)),
        "n = d": case(points(64, 64), proper=False),
        "n >> d": case(points(256, 32)),
        "d = 512": case(points(8 if small else 48, 512, 2)),
        "nearly aligned": case(points(32, 128), noise=1e-2, **near),
        "nearly aligned, n >> d": case(points(256, 64), noise=1e-2, proper=False, **near),
        "spectrum to 1e-8": case(steep(points(32, 128))),
        "spectrum to 1e-8, both": Case(steep(points(32, 128)).float(), steep(points(32, 128)).float(), resolved=1e-10),
        # Condition and residual both below 1e-6.
        "spectrum to 1e-8, nearly aligned": case(steep(points(32, 128)), noise=1e-4, value=1e-3, **near),
        "each point four times": repeated(8),
        "collapsed to one point": repeated(1),
        "reflections": case(points(64, 16), flip=True),
        "reflections allowed": case(points(64, 16), flip=True, proper=False),
    }


def loss_cases(small: bool) -> dict[str, tuple[Op, Op, Tensor, Tensor]]:
    """Op, formula, and unit-norm views that are as near as in training."""
    from trainer.ops.contrastive import nt_xent
    from trainer.ops.gram import gram_equivariance

    def views(n: int, d: int, noise: float) -> Tensor:
        z = torch.randn(n, d)
        return normalize(torch.stack([z, z + noise * torch.randn(n, d)]), dim=2)

    def contrastive(n: int, d: int, temperature: float, noise: float, rows: slice = slice(None)) -> tuple:
        options = {"temperature": temperature, "rows": rows}
        return partial(nt_xent, **options), partial(nt_xent_formula, **options), *views(n, d, noise)

    def gram(n: int, d: int, groups: int, noise: float) -> tuple:
        return partial(gram_equivariance, groups=groups), partial(gram_formula, groups=groups), *views(n, d, noise)

    n = 64 if small else 4096
    return {
        "nt_xent, first": contrastive(n, 128, 0.5, 0.5),
        "nt_xent, temperature 0.05": contrastive(n, 128, 0.05, 1.5),
        "nt_xent, odd sizes": contrastive(37, 50, 0.2, 0.5),
        "nt_xent, one rank's rows": contrastive(n, 128, 0.2, 1.0, slice(n // 4, n // 2)),
        "nt_xent, equal views": contrastive(n, 64, 0.1, 0.0),
        "gram, first, n < d": gram(n, 128, n // 16, 0.5),
        "gram, n > d": gram(n, 16, 2, 0.5),
        "gram, pairs": gram(n, 128, n // 2, 0.5),
        "gram, nearly equal": gram(n, 128, n // 32, 1e-2),
    }

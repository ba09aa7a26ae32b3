"""What a rotation fit costs and how exact it is, against an SVD, eigenvalues, and matrix products alone.

    python benchmarks/rotation_fit.py [--device cpu|cuda] [--repeats 9] [--json FILE]

All methods take turns in every repeat, so that a slow moment of the machine hits all. Errors are relative, against scipy's
orthogonal_procrustes in float64. At noise 0.03 float32 cannot tell the residual to 1e-5: ours
fits again in float64 ("refitted" is the share of such groups).
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from json import dumps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no installed package

import torch
from rich.console import Console
from rich.table import Table
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from benchmarks.contrastive import peak_bytes
from benchmarks.gpu.measure import error, wait
from benchmarks.gpu.speed import eigh_fit, refitted
from trainer.errors import exit_with_one_line
from trainer.ops.rotation_fit import fit_rotation, iterate

Size = tuple[int, int, int, float]  # groups, points, dimensions, noise relative to the points
SIZES: dict[str, list[Size]] = {
    "cpu": [
        (64, 32, 128, 0.3), (64, 32, 128, 0.03), (64, 32, 128, 0.01), (64, 8, 128, 0.3), (64, 64, 128, 0.3),
        (16, 128, 128, 0.3), (64, 256, 32, 0.3), (4, 32, 512, 0.3),
    ],
    "cuda": [
        (1024, 32, 128, 0.3), (1024, 32, 128, 0.03), (1024, 32, 128, 0.01), (1024, 16, 128, 0.3), (256, 64, 128, 0.3),
        (64, 128, 128, 0.3), (64, 256, 128, 0.3), (64, 32, 512, 0.3),
    ],
}  # fmt: skip
CHECKED = 4  # groups compared with scipy's
SVD_GROUPS = 64  # on a GPU a loop over the matrices: its time is measured on so many, and taken to be proportional

Result = tuple[Tensor, ...]  # residual [G] and both gradients [G, n, d]; or the rotation [G, d, d] alone


def ours(a: Tensor, b: Tensor) -> Result:
    a, b = a.requires_grad_(), b.requires_grad_()
    residual = fit_rotation(a, b, group="O", rotation=False).residual
    return residual, *torch.autograd.grad(residual.sum(), (a, b))


def svd_turn(a: Tensor, b: Tensor) -> Result:
    u, _, vh = torch.linalg.svd(a.mT @ b)
    return (u @ vh,)


def svd(a: Tensor, b: Tensor) -> Result:
    (turn,) = svd_turn(a, b)
    forth = a @ turn - b
    return forth.square().sum((1, 2)), 2 * (a - b @ turn.mT), -2 * forth


def products(a: Tensor, b: Tensor) -> Result:
    fit = iterate(a, b, False)
    return fit.residual, fit.source_gradient, fit.target_gradient


def ours_turn(a: Tensor, b: Tensor) -> Result:
    return (fit_rotation(a, b, group="O").rotation,)


ASKED: dict[str, dict[str, Callable[[Tensor, Tensor], Result]]] = {
    "gradients": {"ours": ours, "svd": svd, "eigh": eigh_fit, "products": products},
    "rotation": {"ours": ours_turn, "svd": svd_turn},
}


def points(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random points and the same turned, with noise, float32."""
    groups, count, dim, noise = size
    generator = torch.Generator().manual_seed(0)
    a, moved = torch.randn(2, groups, count, dim, generator=generator) / dim**0.5
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    return a.to(device), (a @ turn + noise * moved).to(device)


def errors(found: Result, a: Tensor, b: Tensor) -> dict[str, float]:
    """Of the residual, and of the gradients where there are any, against scipy's in float64."""
    a, b = (x[:CHECKED].detach().double().cpu() for x in (a, b))
    turns = torch.stack([torch.from_numpy(orthogonal_procrustes(x, y)[0]) for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    residual = (a @ turns - b).square().sum((1, 2))
    if len(found) == 1:
        return {"residual_error": error((a @ found[0][:CHECKED].double().cpu() - b).square().sum((1, 2)), residual)}
    expected = torch.cat([2 * (a - b @ turns.mT), 2 * (b - a @ turns)])
    gradients = torch.cat([gradient[:CHECKED] for gradient in found[1:]])
    return {"residual_error": error(found[0][:CHECKED], residual), "gradient_error": error(gradients, expected)}


def seconds(works: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median time of each, in turns, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}


def measure(device: str, sizes: list[Size] | None = None, repeats: int = 9) -> list[dict]:
    """A row for every size, thing asked for (residual and gradients, or the rotation), and method.

    Returns: groups, points, dim, noise, asked, method, ms, ratio (its time over ours), residual_error, gradient_error (of
        "gradients" only), mib (the most that its tensors take at once), refitted (share of groups that ours fits again in
        float64 where no rotation is asked for).
    """
    where, rows = torch.device(device), []
    for size in sizes or SIZES[where.type]:
        a, b = points(size, where)
        again = refitted(a, b)
        for asked, methods in ASKED.items():
            looped = min(len(a), SVD_GROUPS) if where.type == "cuda" else len(a)
            counts = {name: looped if name == "svd" else len(a) for name in methods}
            works = {name: partial(method, a[: counts[name]], b[: counts[name]]) for name, method in methods.items()}
            spent = {name: s * len(a) / counts[name] for name, s in seconds(works, where, repeats).items()}
            for name, method in methods.items():
                row = dict(zip(("groups", "points", "dim", "noise"), size, strict=True)) | {"asked": asked, "method": name}
                row |= {"ms": 1e3 * spent[name], "ratio": spent[name] / spent["ours"], "refitted": again}
                rows.append(
                    row | errors(method(a[:CHECKED], b[:CHECKED]), a, b) | {"mib": peak_bytes(works[name], where) / 2**20}
                )
    return rows


def benchmark(device: str | None = None, repeats: int = 9, json: str | None = None) -> None:
    """Time, errors and memory of rotation fits.

    Args:
        device: cpu or cuda; default: cuda where there is one.
        repeats: turns that each method takes.
        json: file to write the numbers to as well.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = where.type == "cuda"
    name = torch.cuda.get_device_name(where) if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = f"{name}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores before"
    rows = measure(where.type, repeats=repeats)
    table = Table(title=f"Rotation fits over O(d), median of {repeats}; {machine}")
    for column in (
        "G, n, d",
        "noise",
        "asked",
        "method",
        "ms",
        "ours is faster",
        "residual error",
        "gradient error",
        "refitted",
        "MiB",
    ):
        table.add_column(column, justify="left" if column in ("asked", "method") else "right")
    for row in rows:
        size = f"{row['groups']}, {row['points']}, {row['dim']}"
        cells = [size, f"{row['noise']}", row["asked"], row["method"], f"{row['ms']:.2f}", f"{row['ratio']:.2f} x"]
        gradient = f"{row['gradient_error']:.0e}" if "gradient_error" in row else ""
        table.add_row(
            *cells,
            f"{row['residual_error']:.0e}",
            gradient,
            f"{row['refitted']:.0%}" if row["method"] == "ours" else "",
            f"{row['mib']:.1f}",
            end_section=row["method"] == list(ASKED[row["asked"]])[-1],
        )
    Console(width=120).print(table)
    if json:
        Path(json).write_text(dumps({"machine": machine, "repeats": repeats, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    exit_with_one_line(benchmark)

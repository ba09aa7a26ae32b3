"""What NT-Xent and the Gram term cost, forward and backward, against their formulas with all logits at once.

    python benchmarks/contrastive.py [--device cpu|cuda] [--sizes 256,1024,4096] [--json FILE]

Time is the median of calls, memory the most that tensors of a call take beyond its inputs. A formula whose matrices would
fill more than half of the memory that is free is not run.
"""

import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from json import dumps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no installed package
os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler would tell when it starts and stops

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import measure
from benchmarks.gpu.ops import gram_formula, nt_xent_formula
from trainer.errors import exit_with_one_line
from trainer.ops.contrastive import nt_xent
from trainer.ops.gram import gram_equivariance

DIM, TEMPERATURE = 128, 0.5
SIZES = {"cpu": (256, 1024, 4096, 8192), "cuda": (256, 1024, 4096, 16384, 65536)}
GROUPS = ((16, 16), (16, 64), (64, 32), (256, 32), (16, 256))  # groups, images a group


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that tensors made by a call take at once."""
    if device.type == "cuda":
        return measure.peak_bytes(work, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, held)
    return peak


def cost(loss: Callable, images: int, device: torch.device) -> dict[str, float]:
    """Milliseconds and MiB of the loss and its gradient."""
    torch.manual_seed(0)
    views = normalize(torch.randn(2, images, DIM, device=device), dim=2)
    z1, z2 = (view.clone().requires_grad_() for view in views)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(z1, z2), (z1, z2))

    return {"ms": 1e3 * measure.seconds(step, device), "mib": peak_bytes(step, device) / 2**20}


def cases(sizes: tuple[int, ...]) -> list[tuple[str, int, Callable, Callable, int]]:
    """Name, images, ours, formula, elements of one matrix of the formula."""
    contrastive = [
        (f"nt_xent, N = {n}", n, *(partial(f, temperature=TEMPERATURE) for f in (nt_xent, nt_xent_formula)), 4 * n * n)
        for n in sizes
    ]
    gram = [
        (f"gram_equivariance, {g} x {n}", g * n, *(partial(f, groups=g) for f in (gram_equivariance, gram_formula)), g * n * n)
        for g, n in GROUPS
    ]
    return contrastive + gram


def benchmark(device: str | None = None, sizes: tuple | int | None = None, json: str | None = None) -> None:
    """Time and memory of the losses of a batch.

    Args:
        device: cpu or cuda; default: cuda where there is one.
        sizes: images of NT-Xent's batch; default: up to 8,192 on a CPU and 65,536 on a GPU.
        json: file to write the numbers to as well.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = SIZES[where.type] if sizes is None else sizes if isinstance(sizes, tuple) else (sizes,)
    cuda = where.type == "cuda"
    name = torch.cuda.get_device_name(where) if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = f"{name}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores before"
    rows = {}
    for case, images, ours, formula, elements in cases(sizes):
        free = torch.cuda.mem_get_info(where)[0] if cuda else psutil.virtual_memory().available
        fits = 4 * 4 * elements < free / 2  # logits, softmax, their gradients and a copy, float32
        rows[case] = {"ours": cost(ours, images, where), "formula": cost(formula, images, where) if fits else None}
    table = Table(title=f"Loss and gradient, d = {DIM}, {machine}")
    for column in ("", "ms", "formula's ms", "faster", "MiB", "formula's MiB"):
        table.add_column(column, justify="right" if column else "left")
    for case, row in rows.items():
        own, other = row["ours"], row["formula"]
        theirs = (
            (f"{other['ms']:.2f}", f"{other['ms'] / own['ms']:.1f} x", f"{other['mib']:.1f}") if other else ("skipped",) * 3
        )
        table.add_row(case, f"{own['ms']:.2f}", theirs[0], theirs[1], f"{own['mib']:.1f}", theirs[2])
    Console(width=120).print(table)
    if json:
        Path(json).write_text(dumps({"machine": machine, "dim": DIM, "temperature": TEMPERATURE, "rows": rows}, indent=1))


if __name__ == "__main__":
    exit_with_one_line(benchmark)

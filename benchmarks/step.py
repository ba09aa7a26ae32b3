"""How long is a training step of SimCLR, of CARE with shared views, of CARE with separate views? Side by side in one run.

    python benchmarks/step.py [--recipe demo] [--batch_size 256] [--rounds 7] [--json FILE]

The step is whole (forward, backward, optimiser) on images that are already there: what the loader costs is another
question (data_path.py). The three take turns in every round, so that a slow moment of the machine hits all of them.
"""

import platform
import statistics
import time
from dataclasses import asdict
from json import dumps
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from trainer.config import load_run
from trainer.data.views import Batch
from trainer.engine.engine import build_engine, build_optimiser, place
from trainer.engine.world import look_around
from trainer.errors import exit_with_one_line
from trainer.objectives.objective import build_objective


def variants(recipe: str) -> dict[str, dict]:
    """Overrides of a CARE recipe; SimCLR is its base, with the same head."""
    base = asdict(load_run(recipe).objective.base)
    return {
        "SimCLR": {f"objective.{key}": value for key, value in base.items()},
        "CARE, views shared": {"objective.views": "shared"},
        "CARE, views separate": {"objective.views": "separate"},
    }


def prepare(recipe: str, batch_size: int, overrides: dict):
    """A function that takes one training step, and the number of images it encodes."""
    run = load_run(recipe, {"engine.kind": "ddp", "data.batch_size": batch_size} | overrides)
    world = look_around()
    torch.manual_seed(0)
    objective = place(build_objective(run), run.engine, world).train()
    engine = build_engine(run, objective, build_optimiser(objective, run.optimiser), world)
    size, device = run.data.size, world.device
    views = {v.name: torch.randn(v.count, batch_size, 3, size, size, device=device) for v in objective.views()}
    batch = Batch(views, torch.arange(batch_size), torch.zeros(batch_size, dtype=torch.int64))

    def step() -> None:
        engine.backward(engine.forward(batch).total)
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, sum(len(images) * batch_size for images in views.values())


def benchmark(recipe: str = "demo", batch_size: int = 256, rounds: int = 7, json: str | None = None) -> None:
    """Time the three kinds of step.

    Args:
        recipe: a CARE recipe.
        batch_size: images a step.
        rounds: turns that each kind takes, after one to warm up.
        json: file to write the numbers to as well.
    """
    steps = {name: prepare(recipe, batch_size, overrides) for name, overrides in variants(recipe).items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, (step, _) in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    machine = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows = {
        name: {"images_per_s": batch_size / statistics.median(times), "encoded": steps[name][1], "seconds": sorted(times)}
        for name, times in seconds.items()
    }
    table = Table(title=f"One training step, recipe {recipe}, batch {batch_size}, median of {rounds}; {machine}")
    for column in ("step", "images/s", "relative", "images encoded"):
        table.add_column(column, justify="left" if column == "step" else "right")
    best = rows["SimCLR"]["images_per_s"]
    for name, row in rows.items():
        table.add_row(name, f"{row['images_per_s']:.0f}", f"{row['images_per_s'] / best:.2f}", str(row["encoded"]))
    Console(width=120).print(table)
    if json:
        Path(json).write_text(dumps({"machine": machine, "recipe": recipe, "batch_size": batch_size, "steps": rows}, indent=1))


if __name__ == "__main__":
    exit_with_one_line(benchmark)

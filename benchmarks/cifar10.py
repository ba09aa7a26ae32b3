"""Real images, equal budget, several seeds: SimCLR, CARE with shared views, CARE with separate views.

    python benchmarks/cifar10.py [--recipe care_cifar10_small] [--seeds 3] [--images 5000] [--data DIR]

Prints the table and writes benchmarks/results/cifar10.md and .json. Interrupted, the same command continues.
CIFAR-10 comes from --data (the official files), else from CARE_SHARED_DATA or ../shared/data.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from trainer.checkpoint import check_settings
from trainer.config import load_run
from trainer.errors import UserError, exit_with_one_line
from trainer.evaluation.evaluate import evaluate
from trainer.loop import train

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "cifar10"
MEASURES = ("knn", "linear", "wahba_so", "wahba_o", "l_inv", "unexplained", "gamma", "effective_rank")


def benchmark(recipe: str = "care_cifar10_small", seeds: int = 3, images: int = 5000, data: str | None = None) -> None:
    """Train and evaluate every method with every seed, and write the table.

    Args:
        recipe: a CARE recipe for CIFAR-10.
        seeds: how many, from 0.
        images: training images, at most 45,000.
        data: folder with the official CIFAR-10 files.
    """
    shards = build_shards(data, images)
    base = dataclasses.asdict(load_run(recipe).objective.base)
    methods = {
        "SimCLR": {f"objective.{key}": value for key, value in base.items()},
        "CARE, views shared": {"objective.views": "shared"},
        "CARE, views separate": {"objective.views": "separate"},
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    commits: set[str] = set()
    for seed in range(seeds):
        for name, overrides in methods.items():
            measures, commit = run_one(WORK, recipe, name, seed, overrides, shards)
            results[name].append({key: measures[key] for key in MEASURES})
            commits.add(commit)
            write_table(recipe, results, shards, commits)


def build_shards(data: str | None, images: int) -> Path:
    """Shards of the first `images` training images, and of the whole validation and test splits."""
    shards = WORK / f"shards-{images}"
    if (shards / "train").exists():
        return shards
    if data is None:
        shared = Path(os.environ.get("CARE_SHARED_DATA", ROOT.parent / "shared" / "data"))
        if not shared.is_dir():
            raise UserError(f"no folder {shared}", "CIFAR-10's official files", "Give --data DIR or set CARE_SHARED_DATA.")
        data = str(WORK / "official")
        subprocess.run([sys.executable, shared / "unpack_cifar10.py", shared / "cifar10", data], check=True)
    make = [sys.executable, ROOT / "data_prep/make_shards.py", "--source", "cifar10", "--root", data, "--out", shards]
    for split, limit in (("val", ()), ("test", ()), ("train", ("--limit", str(images)))):
        subprocess.run([*make, "--split", split, *limit], check=True)
    return shards


def run_one(
    work: Path, recipe: str, name: str, seed: int, overrides: dict, shards: Path, **options: object
) -> tuple[dict[str, float], str]:
    """Train, then evaluate on the test split, unless that is done; nothing is chosen by it.

    Returns: the measures, and the commit that they were taken at.

    Raises:
        UserError: what is done was done with other settings.
    """
    folder = work / f"{name.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
    fixed = {"seed": seed, "out": str(folder), "data.shards": str(shards), "engine.kind": "ddp", "tracking.uri": ""}
    run, done = load_run(recipe, fixed | overrides), folder / "evaluation" / "metrics.json"
    check_settings(folder, run)
    _check_asked(folder, {"shards": shards.name, **options})
    if not done.exists():
        start = time.perf_counter()
        if code := train(run):
            sys.exit(code)
        evaluate(folder, shards, done.parent, **options)
        print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    result = json.loads(done.read_text())
    return result["measures"], result["code"]["git_commit"]


def _check_asked(folder: Path, asked: dict) -> None:
    """Hold a folder to the shards and the evaluation that it was begun with: a run's settings do not hold them."""
    path, asked = folder / "asked.json", json.loads(json.dumps(asked))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked))
    elif (before := json.loads(path.read_text())) != asked:
        raise UserError(f"{folder} was asked for {before}, now for {asked}", "the same", "Move the folder away.")


def write_table(recipe: str, results: dict[str, list[dict[str, float]]], shards: Path, commits: set[str]) -> None:
    """Mean and standard deviation over seeds, as Markdown and JSON."""
    run = load_run(recipe)
    seeds = len(results["SimCLR"])
    lines = [
        "# CIFAR-10, equal images, mean ± standard deviation over seeds",
        "",
        f"`python {' '.join(['benchmarks/cifar10.py', *sys.argv[1:]])}` on {os.cpu_count()} {platform.machine()} CPU cores, "
        f"commit {', '.join(sorted(commit[:10] for commit in commits))}, {time.strftime('%Y-%m-%d')}; no GPU.",
        "",
        f"{json.loads((shards / 'train' / 'manifest.json').read_text())['samples']:,} training images, {run.schedule.epochs:g} "
        f"epochs, batch {run.data.batch_size}, {run.model.backbone} {run.model.args}, d = {run.objective.base.dim}, weight "
        f"{run.objective.weight:g} on the pair mean, {run.objective.groups} groups, {seeds} seeds. kNN and linear: per cent of "
        "the 10,000 test images; the geometry on 2,000 of them and 20 draws. Every method sees the same number of images; "
        "separate views encode each four times, the others twice.",
        "",
        *rows_of(results, MEASURES),
    ]
    out = ROOT / "benchmarks" / "results"
    out.mkdir(parents=True, exist_ok=True)
    (out / "cifar10.md").write_text("\n".join(lines) + "\n")
    (out / "cifar10.json").write_text(json.dumps(results, indent=1))
    Console(width=200).print("\n".join(lines[7:]), markup=False)


def rows_of(results: dict[str, list[dict[str, float]]], columns: Sequence[str]) -> list[str]:
    """A Markdown table of means and standard deviations over seeds; a method without a measure has a dash."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, runs in results.items():
        if runs:
            cells = [_cell([run[column] for run in runs if column in run], column) for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(values: list[float], column: str) -> str:
    if not values:
        return "–"
    digits = 1 if column.startswith(("knn", "linear", "effective_rank")) else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    exit_with_one_line(benchmark)

"""Real images, equal budget, several seeds: base methods and what CLeVER and CARE make of them.

    python benchmarks/cifar10_methods.py [--seeds 3] [--images 5000] [--epochs 12] [--data DIR]

DINO and SimSiam against CLeVER on them, all trained with rotations (CAug), their probes read from the whole representation and
from its parts, on the test images as they are and turned and jittered; MoCo-v2 against CARE on it. Prints the table and writes
benchmarks/results/cifar10_methods.md and .json. Interrupted, the same command continues.
"""

import json
import os
import platform
import sys
import time

from cifar10 import ROOT, build_shards, rows_of, run_one
from rich.console import Console

from trainer.errors import exit_with_one_line

CAUG = {"augmentation.rotation": 90.0}
PARTS = ("full", "invariant", "equivariant")
TURNED = "rotation90_jitter"
EVALUATION = {"under": [TURNED], "images": 1000, "draws": 10, "passes": 2}
# name -> recipe, overrides, parts that are probed
METHODS = {
    "DINO": ("dino_cifar10_small", CAUG, PARTS[:1]),
    "CLeVER (DINO)": ("clever_cifar10_small", CAUG, PARTS),
    "SimSiam": ("simsiam_cifar10_small", CAUG, PARTS[:1]),
    "CLeVER (SimSiam)": ("clever_simsiam_cifar10_small", CAUG, PARTS),
    "MoCo-v2": ("moco_cifar10_small", {}, PARTS[:1]),
    "CARE (MoCo-v2)": ("care_moco_cifar10_small", {}, PARTS[:1]),
}
ACCURACY = ["linear", f"linear_{TURNED}", "knn", f"knn_{TURNED}"]
GEOMETRY = ["wahba_so", "l_inv", "unexplained", "gamma", "effective_rank"]


def benchmark(seeds: int = 3, images: int = 5000, epochs: float = 12, data: str | None = None) -> None:
    """Train and evaluate every method with every seed, and write the table.

    Args:
        seeds: how many, from 0.
        images: training images, at most 45,000.
        epochs: passes over them.
        data: folder with the official CIFAR-10 files.
    """
    shards, commits = build_shards(data, images), set()
    work = ROOT / "runs" / f"cifar10_methods-{images}-{epochs:g}"
    results: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        for name, (recipe, overrides, parts) in METHODS.items():
            overrides = overrides | {"schedule.epochs": epochs}
            measures, commit = run_one(work, recipe, name, seed, overrides, shards, parts=parts, **EVALUATION)
            results[name].append(measures)
            commits.add(commit)
            write_table(results, images, epochs, commits)


def write_table(results: dict[str, list[dict[str, float]]], images: int, epochs: float, commits: set[str]) -> None:
    """Mean and standard deviation over seeds, as Markdown and JSON."""
    seeds = max(map(len, results.values()))
    lines = [
        "# Methods on CIFAR-10, equal images, mean ± standard deviation over seeds",
        "",
        f"`python {' '.join(['benchmarks/cifar10_methods.py', *sys.argv[1:]])}` on {os.cpu_count()} {platform.machine()} CPU "
        f"cores, commit {', '.join(sorted(commit[:10] for commit in commits))}, {time.strftime('%Y-%m-%d')}; no GPU.",
        "",
        f"{images:,} training images, {epochs:g} epochs, batch 256, a ResNet of 1.2 M parameters, {seeds} seeds. DINO, SimSiam "
        "and CLeVER on them train with rotations of ±90 degrees (CAug), MoCo-v2 and CARE on it without. Linear probe and kNN: "
        f"per cent of the 10,000 test images, as they are and under {TURNED} (drawn once, by seed). The parts of "
        "CLeVER's representation have rows of their own. No setting was tuned.",
        "",
        *rows_of(by_part(results), ACCURACY),
        "",
        "How 10 of the run's own transformations move the embedding (CLeVER: of the equivariant part), 1,000 test images:",
        "",
        *rows_of(results, GEOMETRY),
    ]
    out = ROOT / "benchmarks" / "results"
    (out / "cifar10_methods.md").write_text("\n".join(lines) + "\n")
    (out / "cifar10_methods.json").write_text(json.dumps(results, indent=1))
    Console(width=240).print("\n".join(lines[6:]), markup=False)


def by_part(results: dict[str, list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """Accuracies of every method, and of every part of its representation that was probed."""
    rows = {}
    for name, runs in results.items():
        for part in METHODS[name][2]:
            suffix = "" if part == "full" else f"_{part}"
            title = name if part == "full" else f"{name}, {part} part"
            rows[title] = [{measure: run[measure + suffix] for measure in ACCURACY} for run in runs]
    return rows


if __name__ == "__main__":
    exit_with_one_line(benchmark)

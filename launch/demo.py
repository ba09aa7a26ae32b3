"""The demo: synthetic shards, SimCLR and CARE from the same seed and budget, both evaluated, one report."""

import os
import subprocess
import sys
import time
from pathlib import Path

from trainer.config import load_run
from trainer.errors import UserError, exit_with_one_line

ROOT = Path(__file__).parents[1]
SHARDS = ROOT / "shards" / "synthetic"
CHOICE = """\
The weight of the equivariance term is the largest of 3 and 10 whose kNN on the validation split is not below SimCLR's
(`python launch/demo.py --weights 3,10` prints them: SimCLR 28.2, weight 3 29.8, weight 10 28.2 per cent, with gamma 1.39,
0.45, 0.30). The sizes are such that the demo ends within ten minutes on two cores. The test images chose nothing."""


def demo(started: float | None = None, weights: tuple[float, ...] = ()) -> None:
    """Build shards, train, evaluate, and write runs/demo/report.html and report.json. Interrupted, it continues.

    Args:
        started: when the command began, Unix seconds, where set-up came before.
        weights: instead, train CARE with each of these weights and print the measures on the validation split.
    """
    began = started or time.time()

    def say(text: str) -> None:
        print(f"[{time.time() - began:4.0f} s] {text}", flush=True)

    say("drawing synthetic images into shards/synthetic")
    _run("python", "data_prep/make_shards.py", "--source", "synthetic", "--out", str(SHARDS))
    if weights:
        _compare(weights if isinstance(weights, tuple | list) else (weights,), say)
        return
    runs = ROOT / "runs" / "demo"
    recipes = {"simclr": "demo_simclr", "care": "demo"}
    for name, recipe in recipes.items():
        _train(recipe, runs / name, say)
    from trainer.evaluation.report import Entry, write_report  # seconds of imports, needed only here
    from trainer.tracking import add_to_run

    for name in recipes:
        _evaluate(runs / name, "test", say)
    entries = {name: Entry(runs / name, runs / name / "evaluation-test") for name in recipes}
    write_report(entries, runs, seconds=round(time.time() - began, 1), choice=CHOICE)
    add_to_run(runs / "care", load_run("demo").tracking, "report", runs / "report.html")
    say("done: open runs/demo/report.html")


def _compare(weights: tuple[float, ...], say) -> None:
    folders = {"simclr": ROOT / "runs" / "demo" / "simclr"} | {f"{w:g}": ROOT / "runs" / f"demo-weight-{w:g}" for w in weights}
    for name, folder in folders.items():
        flags = () if name == "simclr" else ("--objective.weight", name)
        _train("demo_simclr" if name == "simclr" else "demo", folder, say, *flags)
    for name, folder in folders.items():
        measures = _evaluate(folder, "val", say)
        shown = ("knn", "linear", "gamma", "unexplained", "l_inv", "effective_rank", "hue_r2")
        say(f"weight {name}, validation split: " + ", ".join(f"{key} {measures[key]:.3f}" for key in shown))


def _train(recipe: str, out: Path, say, *flags: str) -> None:
    say(f"training: deepspeed launch/train.py --recipe {recipe} {' '.join(flags)}")
    launcher = ("deepspeed", "--num_accelerators", "1", "--log_level", "error")
    _run(*launcher, "launch/train.py", "--recipe", recipe, "--out", str(out), *flags)


def _evaluate(folder: Path, split: str, say) -> dict[str, float]:
    from trainer.evaluation.evaluate import evaluate

    say(f"evaluating {folder.name} on held-out images ({split})")
    measures: dict[str, float] = evaluate(folder, SHARDS, folder / f"evaluation-{split}", split=split)["measures"]
    return measures


def _run(program: str, *arguments: str) -> None:
    """Run a program of this Python's environment."""
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    code = subprocess.run([bin_folder / program, *arguments], cwd=ROOT, env=environment).returncode
    if code:
        found = f"`{program} {' '.join(arguments)}` ended with code {code}"
        raise UserError(found, "0", "Its last lines say why; the same command continues.", code=code if code > 0 else 1)


if __name__ == "__main__":
    exit_with_one_line(demo)

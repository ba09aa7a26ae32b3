"""The demo: synthetic shards, SimCLR and CARE from the same seed and budget, both evaluated, one report."""

import os
import subprocess
import sys
import time
from pathlib import Path

from trainer.errors import UserError, exit_with_one_line

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "demo"
SHARDS = ROOT / "shards" / "synthetic"
RECIPES = {"simclr": "demo_simclr", "care": "demo"}
CHOICE = """\
The weight of the equivariance term (10 of 3, 10 and 30) was chosen on the validation split by gamma and kNN with \
`python launch/demo.py --weights 3,10,30`; length and sizes so that the demo ends within ten minutes on two cores. \
The test images chose nothing."""


def demo(started: float | None = None) -> None:
    """Build shards, train, evaluate, and write runs/demo/report.html and report.json.

    Interrupted, the same command continues.

    Args:
        started: when the command began, Unix seconds, where set-up came before.
    """
    started = started or time.time()
    say = lambda text: print(f"[{time.time() - started:4.0f} s] {text}", flush=True)  # noqa: E731
    say("shards: drawing synthetic images")
    _run(sys.executable, "data_prep/make_shards.py", "--source", "synthetic", "--out", str(SHARDS))
    for name, recipe in RECIPES.items():
        say(f"training {name}: deepspeed launch/train.py --recipe {recipe}")
        _run(_deepspeed(), "--num_accelerators", "1", "launch/train.py", "--recipe", recipe, "--out", str(RUNS / name))
    say("evaluating both on held-out images")
    from trainer.evaluation.evaluate import evaluate
    from trainer.evaluation.report import Entry, write_report

    for name in RECIPES:
        evaluate(RUNS / name, SHARDS, RUNS / name / "evaluation")
        say(f"evaluated {name}")
    entries = {name: Entry(RUNS / name, RUNS / name / "evaluation") for name in RECIPES}
    write_report(entries, RUNS, seconds=round(time.time() - started, 1), choice=CHOICE)
    say(f"report: {RUNS.relative_to(ROOT)}/report.html")


def _deepspeed() -> str:
    """The launcher beside this Python."""
    return str(Path(sys.executable).parent / "deepspeed")


def _run(*command: str) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_LOG_LEVEL": "error"}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if code:
        raise UserError(
            f"`{' '.join(command)}` ended with code {code}", "0", "Its last lines say why; `make demo` continues.", code=1
        )


if __name__ == "__main__":
    exit_with_one_line(demo)

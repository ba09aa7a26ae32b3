"""A run small enough for a test: the same code as any other, with other settings. Not a test itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainer.config import Run, load_run
from trainer.tracking import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = {
    "model.args": {"channels": [4, 8, 8, 16]},
    "objective.groups": 4,
    "data.batch_size": 32,
    "data.shuffle_buffer": 64,  # smaller than the split, so that the buffer's state matters
    "schedule.epochs": 3,
    "schedule.warmup_epochs": 1,
    "checkpoint.every_steps": 5,
    "tracking.log_every": 4,
    "tracking.uri": "",
    "engine.kind": "ddp",
}


def small_run(shards: Path, out: Path, **overrides: Any) -> Run:
    """The demo recipe in small: 14 steps an epoch on the `synthetic_shards`."""
    settings = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_run("demo", settings | {"data.shards": str(shards), "out": str(out)})


def command(shards: Path, out: Path, *extra: str) -> list[str]:
    """The same run as a command line, behind a launcher or `python`."""
    flags = [text for key, value in SMALL.items() for text in (f"--{key}", str(value))]
    return ["launch/train.py", "--recipe", "demo", *flags, "--data.shards", str(shards), "--out", str(out), *extra]


def start(*arguments: str) -> subprocess.Popen:
    """Start a command of the environment's own programs in a session of its own, so that all of it can be ended."""
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    program = [str(bin_folder / arguments[0]), *arguments[1:]]
    return subprocess.Popen(
        program, cwd=ROOT, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(process: subprocess.Popen, condition, timeout: float = 180) -> bool:
    """Poll until a condition holds; False where the process ends before."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    process.kill()
    raise TimeoutError(process.communicate()[0])


def kill_session(process: subprocess.Popen) -> None:
    """kill -9 for the process and all its children that share its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def losses(out: Path) -> dict[int, dict[str, float]]:
    """Every step's loss, terms and learning rate."""
    kept = ("loss", "lr", "terms/contrastive", "terms/equivariance")
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"]
    return {r["step"]: {key: r[key] for key in kept if key in r} for r in records}


def final_weights(out: Path) -> bytes:
    """The bytes of the newest weights: equal bytes are equal bits."""
    return max((out / "checkpoints").glob("step-*")).joinpath("model.safetensors").read_bytes()

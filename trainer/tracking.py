"""What a run records: metrics.jsonl in its folder is the truth; a child process mirrors it to MLflow.

The recorder only appends to local files, so that no tracking server, however slow or dead, can delay or stop a run.
What MLflow shall hold besides the metrics (settings, tags, artifacts, status) is stated in tracking.json.
The mirror, `trainer.mlflow_mirror`, makes MLflow equal to both, now or at the next resume.
"""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil

from trainer import mlflow_mirror
from trainer.config import Tracking
from trainer.errors import STORAGE, UserError
from trainer.mlflow_mirror import METRICS, WANTED

MEGABYTE = 1e6


class Recorder:
    """The record of one run; only rank 0 has one.

    Args:
        run_folder: the run's folder; metrics.jsonl and tracking.json are continued where they exist.
        tracking: the run's tracking settings; an empty `uri` means that MLflow is never imported.
        params: flat settings, {"data.batch_size": 256, ...}.
        tags: what else describes the run: git commit, version, host, world.
    """

    def __init__(self, run_folder: Path, tracking: Tracking, params: dict[str, Any], tags: dict[str, str]) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        self.folder = run_folder
        self.path = run_folder / METRICS
        _cut_torn_line(self.path)
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        before = mlflow_mirror.read_json(run_folder / WANTED)
        self.wanted: dict[str, Any] = {
            "key": before.get("key") or uuid.uuid4().hex,  # finds the MLflow run again, whatever else is lost
            "experiment": tracking.experiment,
            "name": run_folder.name,
            "params": before.get("params", {})
            | {name: mlflow_mirror.without_secrets(str(value)) for name, value in params.items()},
            "tags": before.get("tags", {}) | tags,
            "artifacts": before.get("artifacts", {}),
            "status": "RUNNING",
        }
        self._write_wanted()
        self.mirror = _start_mirror(run_folder, tracking.uri) if tracking.uri else None

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Append one line of metrics; never waits for MLflow.

        Args:
            kind: what is recorded, "train" for example; within a kind, steps rise, but for what a resume repeats.
            step: optimiser steps taken.
            values: scalars by name.

        Raises:
            UserError: the disk is full (exit code STORAGE).
        """
        line = {"kind": kind, "step": step, "time": round(time.time(), 3)} | {
            name: float(value) for name, value in values.items()
        }
        text = json.dumps(line).encode() + b"\n"
        with _storage_told(self.path):
            if os.write(self.file, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Put every line so far on the disk, so that a checkpoint made now never knows more than the record."""
        with _storage_told(self.path):
            os.fsync(self.file)

    def artifact(self, path: Path, name: str = "") -> None:
        """Queue a file or folder for upload into the folder `name` of the MLflow run; again where its content is new."""
        self.wanted["artifacts"][str(path.absolute())] = {"name": name, "modified": path.stat().st_mtime}
        with _storage_told(self.folder / WANTED):
            self._write_wanted()

    def close(self, status: Literal["FINISHED", "KILLED", "FAILED"]) -> None:
        """End the record, without fail.

        Waits for MLflow to get the rest: about a second where it answers, about `2 * mlflow_mirror.REQUEST_S` where it
        hangs, never longer than `mlflow_mirror.DRAIN_S`. What it lacks then, it gets at the next resume.
        """
        try:
            self.wanted["status"] = status
            self._write_wanted()
            self.sync()
            os.close(self.file)
            if self.mirror is not None and self.mirror.stdin is not None:
                self.mirror.stdin.close()  # the mirror reads an end of file and knows that the run has ended
                self.mirror.wait(timeout=mlflow_mirror.DRAIN_S + 1)
        except (OSError, UserError, subprocess.TimeoutExpired) as error:
            print(f"warning: tracking: {error}", file=sys.stderr)
        if self.mirror is not None and self.mirror.poll() is None:
            self.mirror.kill()

    def _write_wanted(self) -> None:
        mlflow_mirror.write_json(self.folder / WANTED, self.wanted)


def add_to_run(
    run_folder: Path, tracking: Tracking, name: str, result: Path, step: int = 0, measures: dict[str, float] | None = None
) -> None:
    """Add a result that came after a run, a file or a folder and its measures, to the run's record and its MLflow run.

    The run keeps its status. A run under way writes its record alone, and a folder that cannot be written is no failure.
    """
    status = mlflow_mirror.read_json(run_folder / WANTED).get("status")
    if status is None:
        return  # a checkpoint that was copied out of its run
    if status == "RUNNING":
        print(f"tracking: {run_folder} has not ended, so that the result is in {result} alone", file=sys.stderr)
        return
    try:
        recorder = Recorder(run_folder, tracking, {}, {})
        if measures:
            recorder.record(name, step, measures)
        recorder.artifact(result, name)
        recorder.close(status)
    except (OSError, UserError) as error:
        print(f"warning: tracking: the result is in {result} alone ({error})", file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order, one a (kind, step): the last, since a resume records steps again."""
    last: dict[tuple[str, int], dict[str, Any]] = {}
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):  # not so while a line is being written
                record = json.loads(line)
                last[record["kind"], record["step"]] = record
    return list(last.values())


def git_commit(folder: Path = Path(__file__).parent) -> str:
    """Full hash of the commit that `folder` is of, with "-dirty" where tracked files differ; "" outside git."""
    answer = ""
    for command in (["ls-files", "--error-unmatch", "."], ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]):
        try:
            run = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return ""
        answer = run.stdout.strip()
    return answer


def system_metrics() -> dict[str, float]:
    """Load of this host and of this rank's GPU, by MLflow's names; the processor's load is the mean since the last call.

    Recorded under the kind "system", they fill the system tab of MLflow's pages.
    """
    import torch  # here: readers of metrics.jsonl need none

    memory = psutil.virtual_memory()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info()
        values[f"gpu_{gpu}_memory_usage_megabytes"] = (total - free) / MEGABYTE
        values[f"gpu_{gpu}_memory_usage_percentage"] = 100 * (total - free) / total
        with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # without nvidia-ml-py, or a driver that does not tell
            values[f"gpu_{gpu}_utilization_percentage"] = torch.cuda.utilization()
    return values


@contextlib.contextmanager
def _storage_told(path: Path) -> Iterator[None]:
    """A file that cannot be written ends the run as a checkpoint that cannot be written does."""
    try:
        yield
    except OSError as error:
        found, remedy = f"{path} cannot be written ({error.strerror})", "Make room; the same command continues."
        raise UserError(found, "room for the record", remedy, code=STORAGE) from error


def _start_mirror(run_folder: Path, uri: str) -> "subprocess.Popen[bytes]":
    """A process, not a thread: importing MLflow takes seconds of the interpreter's lock, and a hung thread delays the exit.

    The URI travels in the environment, since command lines are public. A session of its own keeps Ctrl-C away.
    """
    command = [sys.executable, "-W", "ignore", "-m", mlflow_mirror.__name__, str(run_folder), "--follow"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def _cut_torn_line(path: Path, longest: int = 1 << 20) -> None:
    """Drop what follows the last newline: a line whose writing was interrupted."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - longest))
        file.truncate(start + file.read().rfind(b"\n") + 1)

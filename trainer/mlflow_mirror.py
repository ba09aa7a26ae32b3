"""Makes MLflow equal to what a run's folder records, as a process beside the run or by hand after it.

    MLFLOW_TRACKING_URI=URI python -m trainer.mlflow_mirror RUN_FOLDER

sends whatever the MLflow of that URI lacks. The folder is the queue: metrics.jsonl holds the metrics, tracking.json the
rest, and mlflow.json what was sent, which is written after sending. A crash in between repeats a batch of equal values
with equal times and steps, which MLflow's stores keep once. A run is found again by its id, or by the key it is tagged
with: it stays one MLflow run over any number of resumes.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS, WANTED, SENT = "metrics.jsonl", "tracking.json", "mlflow.json"
KEY_TAG = "care_trainer.key"

POLL_S = 1.0  # between looks at the files
LONGEST_DELAY_S = 60.0  # between attempts at a server that does not answer
DRAIN_S = 60.0  # to send the rest after the run has ended, while MLflow answers; two failures end it sooner
REQUEST_S = 5  # for one answer of the server
BATCH = 1000  # metrics a request, MLflow's limit


class Mirror:
    """One run's folder and its MLflow run.

    Args:
        folder: the run's folder.
        uri: MLflow's tracking URI.
    """

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.client: Any = None  # an MlflowClient
        self.wanted = read_json(folder / WANTED)
        self.sent: dict[str, Any] = {}
        self.offset = 0  # bytes of metrics.jsonl read; a new process reads from the start and skips the steps already sent

    def update(self, ended: bool) -> None:
        """Send what MLflow lacks.

        Args:
            ended: the run has ended; if its files do not say how, it died.

        Raises:
            Exception: whatever MLflow raises; nothing that was not sent counts as sent.
        """
        self.wanted = read_json(self.folder / WANTED)
        if self.client is None:
            self.client = connect(self.uri)
        if not self.sent:
            self.sent = self._open()
        self._send_description()
        self._send_metrics()
        self._send_status("FAILED" if ended and self.wanted["status"] == "RUNNING" else self.wanted["status"])
        self._send_artifacts()

    def _open(self) -> dict[str, Any]:
        """What was sent so far to the run's MLflow run, which is found or else made."""
        from mlflow.exceptions import MlflowException

        name, tag = self.wanted["experiment"], {KEY_TAG: self.wanted["key"], "mlflow.runName": self.wanted["name"]}
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            with contextlib.suppress(MlflowException):  # another run was faster
                file = _sqlite_file(self.uri)  # its artifacts lie beside it; a server decides for itself
                self.client.create_experiment(name, artifact_location=file.with_name("mlartifacts").as_uri() if file else None)
            experiment = self.client.get_experiment_by_name(name)
        known = self.client.search_runs([experiment.experiment_id], f"tags.`{KEY_TAG}` = '{self.wanted['key']}'", max_results=1)
        run = known[0] if known else self.client.create_run(experiment.experiment_id, tags=tag)
        sent = read_json(self.folder / SENT)
        # A run that the files do not know is empty, or of another server: it gets everything.
        return sent if sent.get("run_id") == run.info.run_id else {"run_id": run.info.run_id, "steps": {}}

    def _send_description(self) -> None:
        """Settings and tags. MLflow's params are written once: what a resume changed becomes a tag."""
        from mlflow.entities import Param, RunTag

        old, new = self.sent.get("params", {}), self.wanted["params"]
        changed = {f"now.{key}": value for key, value in new.items() if old.get(key, value) != value}
        tags = self.wanted["tags"] | changed
        if "git_commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git_commit"]
        if old.keys() >= new.keys() and self.sent.get("tags") == tags:
            return
        params = [Param(key, value[:6000]) for key, value in new.items() if key not in old]
        for start in range(0, max(len(params), 1), 100):
            batch_tags = [RunTag(key, value) for key, value in tags.items()] if start == 0 else []
            self.client.log_batch(self.sent["run_id"], params=params[start : start + 100], tags=batch_tags)
        self._note(params=new | old, tags=tags)

    def _send_metrics(self) -> None:
        from mlflow.entities import Metric

        for lines, offset in _batches(self.folder / METRICS, self.offset, self.sent["steps"]):
            metrics = [
                Metric(re.sub(r"[^\w\-. /]", "_", f"{line['kind']}/{name}"), value, int(1000 * line["time"]), line["step"])
                for line in lines
                for name, value in line.items()
                if name not in ("kind", "step", "time")
            ]
            if metrics:
                self.client.log_batch(self.sent["run_id"], metrics=metrics)
                self._note(steps=self.sent["steps"] | {line["kind"]: line["step"] for line in lines})
            self.offset = offset

    def _send_status(self, status: str) -> None:
        if status == self.sent.get("status"):
            return
        if status == "RUNNING":
            self.client.update_run(self.sent["run_id"], status)
        else:
            self.client.set_terminated(self.sent["run_id"], status)
        self._note(status=status)

    def _send_artifacts(self) -> None:
        for path, artifact in self.wanted["artifacts"].items():
            done = self.sent.get("artifacts", {})
            if done.get(path) == artifact:
                continue
            if Path(path).is_dir():
                self.client.log_artifacts(self.sent["run_id"], path, artifact["name"] or None)
            elif Path(path).exists():  # it may have been pruned since
                self.client.log_artifact(self.sent["run_id"], path, artifact["name"] or None)
            self._note(artifacts=done | {path: artifact})

    def _note(self, **sent: Any) -> None:
        self.sent |= sent
        write_json(self.folder / SENT, self.sent)


def _batches(path: Path, offset: int, sent: dict[str, int]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Complete lines from a byte offset on whose step their kind has not sent, and the offset after them.

    A resume records steps again; the values are equal, so that the first ones stand.
    """
    seen, values = dict(sent), 0
    lines: list[dict[str, Any]] = []
    with path.open("rb") as file:
        file.seek(offset)
        for text in file:
            if not text.endswith(b"\n"):
                break
            line = json.loads(text)
            if line["step"] > seen.get(line["kind"], -1):
                if values + len(line) > BATCH:
                    yield lines, offset
                    lines, values = [], 0
                seen[line["kind"]] = line["step"]
                lines.append(line)
                values += len(line)
            offset += len(text)
    yield lines, offset


def follow(mirror: Mirror, ended: threading.Event) -> None:
    """Update until the run has ended; a server that does not answer is tried again, ever less often, and not long at the end.

    It warns once when MLflow fails and once when it is back.
    """
    delay, failing = POLL_S, False
    while True:
        last = ended.is_set()
        try:
            mirror.update(last)
            if failing:
                print("tracking: MLflow answers again", file=sys.stderr)
            delay, failing = POLL_S, False
            if last:
                return
        except Exception as error:
            if not failing:
                reason = without_secrets(" ".join(str(error).split()))[:160]
                print(f"warning: tracking: MLflow fails, {METRICS} keeps everything ({reason})", file=sys.stderr)
            elif last:
                give_up()
            delay, failing = min(2 * delay, LONGEST_DELAY_S), True
        if last:
            time.sleep(POLL_S)
        else:
            ended.wait(delay)


def give_up() -> None:
    """Leave the rest for later; nothing may hold the exit."""
    print(
        "warning: tracking: MLflow lacks the end of this run; a resume or `python -m trainer.mlflow_mirror` sends it",
        file=sys.stderr,
    )
    os._exit(1)


def without_secrets(text: str) -> str:
    """The text with user names and passwords of URIs masked."""
    return re.sub(r"://\S*@", "://***@", text)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; {} where there is none, or none that is whole."""
    try:
        mapping: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return mapping


def write_json(path: Path, mapping: dict[str, Any]) -> None:
    """Replace a JSON file: a reader sees the old one or the new one, whole."""
    new = path.with_suffix(".new")
    with new.open("w") as file:
        json.dump(mapping, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def connect(uri: str) -> Any:
    """An `mlflow.MlflowClient` that does not wait long and tells nobody; a sqlite file is made where there is none."""
    defaults = {"DISABLE_TELEMETRY": "true", "HTTP_REQUEST_TIMEOUT": str(REQUEST_S), "HTTP_REQUEST_MAX_RETRIES": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(f"MLFLOW_{name}", value)
    logging.disable(logging.WARNING)
    from mlflow import MlflowClient

    if path := _sqlite_file(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():  # MLflow makes it in many steps, which neither another run nor a kill may interrupt
                new = path.with_name(f"{path.name}.new")
                new.unlink(missing_ok=True)
                MlflowClient(f"sqlite:///{new}")
                new.rename(path)
    return MlflowClient(uri)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _watch(ended: threading.Event) -> None:
    """Standard input ends when the run does, however it ends; the rest gets DRAIN_S, hung or not."""
    sys.stdin.buffer.read()
    ended.set()
    time.sleep(DRAIN_S)
    give_up()


def main() -> None:
    """Entry point of `python -m trainer.mlflow_mirror`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--follow", action="store_true", help="until standard input ends")
    arguments = parser.parse_args()
    ended = threading.Event()
    if arguments.follow:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # Slurm sends them to every process of a step
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_watch, args=(ended,), daemon=True).start()
    else:
        ended.set()
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        sys.exit("error: MLFLOW_TRACKING_URI is not set; expected the URI of an MLflow server or file.")
    if not read_json(arguments.folder / WANTED):
        sys.exit(f"error: {arguments.folder} holds no {WANTED}; expected the folder of a run.")
    with (arguments.folder / METRICS).open() as file:
        try:  # a killed run's mirror may still be draining
            fcntl.flock(file, fcntl.LOCK_EX if arguments.follow else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: {arguments.folder} is being mirrored by another process.")
        except OSError:  # a file system without locks
            pass
        follow(Mirror(arguments.folder, uri), ended)


if __name__ == "__main__":
    main()

"""The record of a run and its mirror, against real `mlflow server` processes that come late, die and hang."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer import mlflow_mirror
from trainer.config import Tracking
from trainer.errors import STORAGE, UserError
from trainer.tracking import Recorder, add_to_run, git_commit, read_metrics, system_metrics

ENDS_WITHIN_S = 4 * mlflow_mirror.REQUEST_S  # two requests that nobody answers, on a busy machine
PARAMS = {"data.batch_size": 256, "objective.name": "care"}


def record(recorder: Recorder, steps: range) -> None:
    for step in steps:
        recorder.record("train", step, {"loss": 1 / (1 + step), "lr": 1e-3})
        if step % 100 == 0:
            recorder.record("system", step, {"cpu_utilization_percentage": step / 25})


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def the_only_run_holds_the_file(uri: str, metrics: Path, experiment: str = "care"):
    """MLflow's single run of the experiment, after checking every metric of every step against metrics.jsonl."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    wanted = {
        (f"{line['kind']}/{name}", line["step"], str(value))
        for line in read_metrics(metrics)
        for name, value in line.items()
        if name not in ("kind", "step", "time")
    }
    history = [metric for key in run.data.metrics for metric in client.get_metric_history(run.info.run_id, key)]
    assert sorted((m.key, m.step, str(m.value)) for m in history) == sorted(wanted)  # nothing missing, nothing twice
    return run, client


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tmp_path: Path, port: int) -> Iterator[Callable[[], subprocess.Popen]]:
    """Starts an MLflow server; the next one, after a death, finds what the last one stored."""
    started = []

    def start() -> subprocess.Popen:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "store")]
        quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (tmp_path / "server.log").open("ab") as log:
            started.append(subprocess.Popen(command + store, env=quiet, stdout=log, stderr=log, start_new_session=True))
        wait_for(answers, 120)
        return started[-1]

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
        except (urllib.error.URLError, OSError):
            return False

    yield start
    for process in started:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the server and its worker
        process.wait()


def test_a_server_that_comes_late_and_dies_ends_with_one_whole_run(tmp_path, server, port, capfd):
    folder, tracking = tmp_path / "run", Tracking(uri=f"http://127.0.0.1:{port}")
    tags = {"git_commit": git_commit(), "version": "0"}

    recorder = Recorder(folder, tracking, PARAMS, tags)
    record(recorder, range(400))  # nobody listens
    first = server()
    recorder.close("KILLED")
    assert the_only_run_holds_the_file(tracking.uri, folder / "metrics.jsonl")[0].info.status == "KILLED"

    recorder = Recorder(folder, tracking, PARAMS, tags)
    record(recorder, range(300, 600))  # from a checkpoint after step 299
    wait_for(lambda: mlflow_mirror.read_json(folder / "mlflow.json")["steps"]["train"] == 599, 20)
    kill(first)
    began = time.monotonic()
    record(recorder, range(600, 2400))
    assert time.monotonic() - began < 2  # none of 1,800 waits for a server that is gone
    recorder.artifact(folder / "metrics.jsonl", "record")
    began = time.monotonic()
    recorder.close("KILLED")
    assert time.monotonic() - began < ENDS_WITHIN_S
    said = capfd.readouterr().err
    assert said.count("MLflow answers again") == 1
    assert said.count("MLflow fails") == 2  # once an outage

    server()
    recorder = Recorder(folder, tracking, PARAMS | {"data.threads": 4}, tags)
    record(recorder, range(1500, 2500))
    recorder.record("system", 2500, system_metrics())
    recorder.record("train", 2500, {"loss": float("nan")})
    (report := tmp_path / "report.html").write_text("<html>")
    recorder.artifact(report)
    recorder.close("FINISHED")

    assert len(read_metrics(folder / "metrics.jsonl")) == 2501 + 26
    run, client = the_only_run_holds_the_file(tracking.uri, folder / "metrics.jsonl")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"data.batch_size": "256", "objective.name": "care", "data.threads": "4"}
    assert run.data.tags["mlflow.source.git.commit"] == tags["git_commit"]
    assert "system/process_memory_usage_megabytes" in run.data.metrics
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["record", "report.html"]
    assert client.list_artifacts(run.info.run_id, "record")[0].path == "record/metrics.jsonl"


def test_a_server_that_accepts_and_never_answers_delays_nothing_and_no_password_shows(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0), backlog=50) as hole:
        uri = f"http://user:geheim@127.0.0.1:{hole.getsockname()[1]}"
        recorder = Recorder(tmp_path, Tracking(uri=uri), PARAMS | {"tracking.uri": uri}, {})
        hole.accept()  # the mirror has asked, and waits
        began = time.monotonic()
        record(recorder, range(2000))
        recorder.sync()
        assert time.monotonic() - began < 2
        began = time.monotonic()
        recorder.close("FINISHED")
        assert time.monotonic() - began < ENDS_WITHIN_S
        assert recorder.mirror.poll() is not None
    said = capfd.readouterr()
    assert "MLflow lacks the end of this run" in said.err
    assert "geheim" not in said.err + said.out
    assert not [file for file in tmp_path.iterdir() if "geheim" in file.read_text()]


def test_two_runs_start_one_sqlite_file_together_and_a_killed_one_continues_as_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = Tracking()
    doomed = """
import os, pathlib, signal
from trainer.config import Tracking
from trainer.tracking import Recorder
recorder = Recorder(pathlib.Path("runs/killed"), Tracking(experiment="killed"), {}, {})
for step in range(50):
    recorder.record("train", step, {"loss": step / 7})
recorder.artifact(pathlib.Path("runs/killed/tracking.json"))
pathlib.Path("runs/killed/metrics.jsonl").open("a").write('{"kind": "train", "st')
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.Popen([sys.executable, "-c", doomed])
    recorder = Recorder(Path("runs/whole"), default, PARAMS, {})
    record(recorder, range(300))
    assert killed.wait() == -signal.SIGKILL
    again = Recorder(Path("runs/killed"), Tracking(experiment="killed"), {}, {})  # waits for the dead run's mirror
    for step in range(20, 80):
        again.record("train", step, {"loss": step / 7})
    recorder.close("FINISHED")
    again.close("FINISHED")

    for folder, experiment in (("runs/whole", "care"), ("runs/killed", "killed")):
        run, client = the_only_run_holds_the_file(default.uri, Path(folder, "metrics.jsonl"), experiment)
        assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["tracking.json"]
    assert not Path("mlruns").exists()

    elsewhere = {"MLFLOW_TRACKING_URI": "sqlite:///other/store.db"}
    subprocess.run([sys.executable, "-m", "trainer.mlflow_mirror", "runs/whole"], env=os.environ | elsewhere, check=True)
    the_only_run_holds_the_file(elsewhere["MLFLOW_TRACKING_URI"], Path("runs/whole/metrics.jsonl"))


def test_a_torn_line_is_cut_and_the_last_record_of_a_step_counts(tmp_path):
    for torn in ('{"kind": "train", "step": 3', "x" * 3000):
        recorder = Recorder(tmp_path, Tracking(uri=""), {}, {})
        assert recorder.mirror is None
        recorder.record("train", 1, {"loss": 1.0})
        recorder.record("train", 2, {"loss": float("nan")})
        recorder.record("train", 2, {"loss": 0.5})
        recorder.close("FINISHED")
        with recorder.path.open("a") as file:
            file.write(torn)
        expected = [("train", 1, 1.0), ("train", 2, 0.5)]
        assert [(r["kind"], r["step"], r["loss"]) for r in read_metrics(recorder.path)] == expected
    whole = recorder.path.read_bytes().rpartition(b"\n")[0] + b"\n"
    Recorder(tmp_path, Tracking(uri=""), {}, {}).close("FINISHED")
    assert recorder.path.read_bytes() == whole


def test_an_evaluation_joins_the_record_of_its_run_and_of_no_other(tmp_path):
    run, figures, quiet = tmp_path / "run", tmp_path / "figures", Tracking(uri="")
    figures.mkdir()
    add_to_run(run, quiet, "evaluation/test", figures, 7, {"knn": 40.0})
    assert not run.exists()
    Recorder(run, quiet, {"seed": 3}, {"git_commit": "abc"}).close("FINISHED")
    add_to_run(run, quiet, "evaluation/test", figures, 7, {"knn": 40.0})
    assert [(r["kind"], r["step"], r["knn"]) for r in read_metrics(run / "metrics.jsonl")] == [("evaluation/test", 7, 40.0)]
    wanted = mlflow_mirror.read_json(run / "tracking.json")
    assert (wanted["params"], wanted["tags"]) == ({"seed": "3"}, {"git_commit": "abc"})
    assert [artifact["name"] for artifact in wanted["artifacts"].values()] == ["evaluation/test"]


def test_an_evaluation_leaves_the_status_of_its_run_and_the_record_of_a_run_under_way(tmp_path, capfd):
    quiet, run = Tracking(uri=""), tmp_path / "run"
    recorder = Recorder(run, quiet, {}, {})
    recorder.record("train", 1, {"loss": 1.0})
    before = (run / "metrics.jsonl").read_bytes(), (run / "tracking.json").read_bytes()
    add_to_run(run, quiet, "evaluation/test", tmp_path, 1, {"knn": 40.0})
    assert ((run / "metrics.jsonl").read_bytes(), (run / "tracking.json").read_bytes()) == before
    assert "has not ended" in capfd.readouterr().err
    recorder.close("KILLED")
    add_to_run(run, quiet, "evaluation/test", tmp_path, 1, {"knn": 40.0})
    assert mlflow_mirror.read_json(run / "tracking.json")["status"] == "KILLED"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_record_ends_with_the_code_of_storage(tmp_path):
    recorder = Recorder(tmp_path, Tracking(uri=""), {}, {})
    os.close(recorder.file)
    recorder.file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(No space left") as error:
        recorder.record("train", 1, {"loss": 1.0})
    assert error.value.code == STORAGE


def test_the_commit_of_a_folder_outside_git_is_empty(tmp_path):
    assert git_commit(tmp_path) == ""
    assert len(git_commit().removesuffix("-dirty")) == 40

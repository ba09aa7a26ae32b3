"""The life of a run: killed anywhere, the same command gives the same losses and weights, bit for bit."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from runs import command, final_weights, kill_session, losses, small_run, start, wait_for
from trainer.errors import DIVERGED, STOPPED, UserError


@pytest.fixture(scope="module")
def uninterrupted(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainer.loop import train

    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(small_run(synthetic_shards, out)) == 0
    return out


def same(out: Path, reference: Path) -> None:
    assert losses(out) == losses(reference)
    assert final_weights(out) == final_weights(reference)
    assert not list((out / "checkpoints").glob(".unfinished*"))


def test_every_step_is_recorded_and_the_loss_falls(uninterrupted):
    record = losses(uninterrupted)
    assert sorted(record) == list(range(1, 43))
    first, last = ([record[s]["loss"] for s in steps] for steps in (range(1, 11), range(33, 43)))
    assert sum(last) < sum(first)


def test_another_seed_gives_another_run(synthetic_shards, uninterrupted, tmp_path):
    from trainer.loop import train

    assert train(small_run(synthetic_shards, tmp_path / "run", seed=1, schedule__epochs=0.3)) == 0
    assert losses(tmp_path / "run")[1]["loss"] != losses(uninterrupted)[1]["loss"]


def test_kill_9_anywhere_changes_nothing(synthetic_shards, uninterrupted, tmp_path):
    """Killed mid-epoch, while a checkpoint is written, in the second epoch, then left alone."""
    out = tmp_path / "run"
    checkpoints = out / "checkpoints"
    moments = [
        lambda: (checkpoints / "step-00000005").exists(),
        lambda: any(path.name not in left for path in checkpoints.glob(".unfinished*")),
        lambda: (checkpoints / "step-00000020").exists(),
    ]
    for moment in moments:
        left = {path.name for path in checkpoints.glob(".unfinished*")}  # by the kill before
        process = start("python", *command(synthetic_shards, out))
        assert wait_for(process, moment), process.communicate()[0]
        kill_session(process)
        assert process.returncode == -signal.SIGKILL
    process = start("python", *command(synthetic_shards, out))
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert "continuing" in output
    same(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_saves_and_exits_with_its_code(synthetic_shards, uninterrupted, tmp_path, number):
    from trainer.loop import train

    out = tmp_path / "run"
    process = start("python", *command(synthetic_shards, out, "--checkpoint.every_steps", "1000"))
    assert wait_for(process, lambda: (out / "metrics.jsonl").exists() and losses(out))
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == STOPPED, output
    assert number.name in output
    assert len(list((out / "checkpoints").glob("step-*"))) == 1
    assert train(small_run(synthetic_shards, out)) == 0
    same(out, uninterrupted)


def test_two_deepspeed_ranks_survive_the_death_of_one(synthetic_shards, tmp_path):
    """ZeRO-2 through DeepSpeed's launcher: kill -9 one rank, the launcher ends the other, the same command continues."""
    zero = ("--engine.kind", "deepspeed", "--engine.zero_stage", "2", "--nodes", "1", "--schedule.epochs", "2")

    def run(out: Path, port: int) -> subprocess.Popen:
        launcher = ("deepspeed", "--num_accelerators", "2", "--master_port", str(port))
        return start(*launcher, *command(synthetic_shards, out, *zero))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = run(whole, 29611)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output

    process = run(killed, 29612)
    assert wait_for(process, lambda: (killed / "checkpoints" / "step-00000005").exists()), process.communicate()[0]
    ranks = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "local_rank=1"], capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0, output

    process = run(killed, 29613)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    same(killed, whole)


def test_a_loss_that_is_not_finite_stops_the_run(synthetic_shards, tmp_path):
    from trainer.loop import train

    run = small_run(synthetic_shards, tmp_path / "run", optimiser__name="sgd", optimiser__lr=1e30, schedule__warmup_epochs=0)
    with pytest.raises(UserError, match=r"step \d+ is not finite .*last good checkpoint: ") as error:
        train(run)
    assert error.value.code == DIVERGED
    for weights in (tmp_path / "run").glob("checkpoints/*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


def test_the_best_checkpoint_by_the_validation_split_is_kept(synthetic_shards, tmp_path):
    from trainer.loop import train
    from trainer.tracking import read_metrics

    out = tmp_path / "run"
    assert (
        train(small_run(synthetic_shards, out, tracking__knn_every_epochs=1, checkpoint__keep=1, checkpoint__every_steps=5))
        == 0
    )
    measured = {r["step"]: r["knn"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "validation"}
    assert sorted(measured) == [14, 28, 42]
    best = max(measured, key=lambda step: (measured[step], -step))
    kept = {int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")}
    assert kept == {best, 42}

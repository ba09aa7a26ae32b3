"""The command: bad input is one line and a code, a dry run touches nothing, promises are checked."""

import subprocess
import sys
from pathlib import Path

import pytest

from runs import ROOT, SMALL, command
from trainer.errors import UserError


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_bad_input_is_one_line_and_a_code(synthetic_shards: Path, tmp_path: Path):
    done = run(*command(synthetic_shards, tmp_path / "run", "--nodes", "4"))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert lines[0].startswith("error: --nodes 4 was promised, but the launcher started 1 node")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data.batch_size": 33}, "objective.groups"),
        ({"data.batch_size": 512}, "holds 450 samples"),
        ({"data.shards": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"model.backbone": "resnet81"}, "'resnet18'"),
        ({"model.args": {"depth_of_field": 3}}, "model.args"),
        ({"optimiser.lear_rate": 1}, "lr"),
        ({"engine.zero_stage": 2, "optimiser.name": "lars"}, "zero_stage"),
        ({"objective.base": {"name": "care", "base": {"name": "simclr"}}}, "base.name is 'care'"),
        ({"engine.zero_stage": 1}, "engine.kind ddp"),
    ],
)
def test_bad_settings_are_told_before_anything_is_written(synthetic_shards: Path, tmp_path: Path, settings, told):
    from launch.train import train

    out = tmp_path / "run"
    with pytest.raises(UserError, match=told):
        train("demo", **(SMALL | {"data.shards": str(synthetic_shards), "out": str(out)} | settings))
    assert not out.exists()


def test_a_dry_run_prices_the_run_and_touches_nothing(synthetic_shards, tmp_path):
    done = run(*command(synthetic_shards, tmp_path / "run", "--dry_run"))
    assert done.returncode == 0, done.stderr
    for told in ("batch_size: 32", "1 rank(s)", "450", "42 (14 an epoch", "parameters", "GiB", "sent by a rank"):
        assert told in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_estimates_of_a_dry_run_follow_from_the_model():
    import torch

    from trainer.config import load_run
    from trainer.objectives.objective import build_objective
    from trainer.plan import estimate

    run = load_run("care_cifar10")
    parameters = sum(p.numel() for p in build_objective(run).parameters())
    alone, four = estimate(run, 1), estimate(run, 4)
    assert alone.parameters == parameters
    assert (alone.encoded, alone.sent_bytes) == (4 * 256, 0)
    embeddings = 256 * 2 * 128 * 4
    assert four.sent_bytes == pytest.approx(0.75 * (8 * parameters + 3 * embeddings))
    assert four.memory_bytes < alone.memory_bytes
    assert torch.get_default_device().type == "cpu"


def test_a_dry_run_counts_what_training_keeps_and_gathers():
    """DINO's logits are kept, of all views and prototypes; methods without negatives gather nothing."""
    from trainer.config import load_run
    from trainer.plan import estimate

    cost = {out: estimate(load_run("dino_cifar10_small", {"objective.out": out}), 4) for out in (1024, 4096)}
    logits = 6 * 64 * 3072 * 4  # of 2 + 4 views of a rank's 64 images, float32
    more = cost[4096].memory_bytes - cost[1024].memory_bytes
    weights = 4 * 4 * (cost[4096].parameters - cost[1024].parameters) + 4 * (cost[4096].frozen - cost[1024].frozen)
    assert 1 <= (more - weights) / logits < 4
    assert cost[1024].sent_bytes == pytest.approx(0.75 * 8 * cost[1024].parameters)


def test_help_is_quick_and_complete():
    done = run("-X", "importtime", "launch/train.py", "--help")
    assert "--recipe" in done.stdout + done.stderr
    assert not {"torch", "deepspeed", "mlflow"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}

"""Engines agree with one another; schedules and BatchNorm with their formulas."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer.checkpoint import Progress
from trainer.config import Optimiser, Schedule, load_run
from trainer.data.views import Batch
from trainer.engine.batchnorm import synchronise_batchnorm
from trainer.engine.engine import build_engine, build_optimiser, place
from trainer.engine.world import join, leave, look_around
from trainer.objectives.objective import build_objective
from trainer.prepare import Trainer, build_schedule

STEPS = 4
BASES = {
    "simclr": {"name": "simclr", "hidden": 64},
    "with a teacher, which does not train": {"name": "byol", "hidden": 64},
    "with a layer that is frozen": {"name": "dino", "hidden": 64, "bottleneck": 16, "out": 128, "local_crops": 0},
}


def losses(shards, out, **overrides) -> list[float]:
    """Losses of a few steps on random images, and then the weights' sum."""
    from runs import small_run

    run, world = small_run(shards, out, engine__precision="fp32", **overrides), look_around()
    torch.manual_seed(0)
    objective = place(build_objective(run), run.engine, world).train()
    engine = build_engine(run, objective, build_optimiser(objective, run.optimiser), world)
    values = []
    for step in range(STEPS):
        objective.before_step(step / STEPS, step)
        images = torch.randn(2, 32, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        loss = engine.forward(Batch({"paired": images}, torch.arange(32), torch.zeros(32)))
        engine.backward(loss.total)
        engine.step()
        objective.after_step()
        values.append(loss.total.item())
    return [*values, sum(p.double().abs().sum().item() for p in objective.parameters())]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A world of one rank; DeepSpeed keeps to the first process group that it meets."""
    join(look_around(), expected_nodes=None, timeout_minutes=1)
    yield
    leave()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize("base", BASES)
def test_deepspeed_takes_the_steps_that_ddp_takes(synthetic_shards, tmp_path, stage, clip, base):
    common = {"optimiser__clip_norm": clip} | {f"objective__base__{key}": value for key, value in BASES[base].items()}
    plain = losses(synthetic_shards, tmp_path, **common)
    settings = {"engine__kind": "deepspeed", "engine__zero_stage": stage}
    zero = losses(synthetic_shards, tmp_path, **common, **settings)
    assert zero == pytest.approx(plain, rel=1e-4)


def test_the_learning_rate_follows_its_formula_at_every_step():
    """Linear warm-up to the peak, then min + (peak - min) (1 + cos(pi t / T)) / 2."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = build_schedule(Schedule(epochs=10, warmup_epochs=2, min_lr=0.1), optimiser, steps=100, steps_per_epoch=10)
    for step in range(100):
        schedule.step_update(step)
        if step < 20:
            expected = 0.8 / 20 + step * (0.8 - 0.8 / 20) / 20
        else:
            expected = 0.1 + 0.35 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert optimiser.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)


def test_a_constant_schedule_stays_at_its_peak():
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = build_schedule(Schedule(epochs=10, name="constant"), optimiser, steps=100, steps_per_epoch=10)
    for step in (0, 50, 99):
        schedule.step_update(step)
        assert optimiser.param_groups[0]["lr"] == pytest.approx(0.8)


def test_weight_decay_follows_its_cosine_where_there_is_any():
    """end - (end - start) (1 + cos(pi t / T)) / 2, of weights; biases and norms stay exempt."""
    settings = Optimiser(weight_decay=0.04, weight_decay_end=0.4)
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimiser = build_optimiser(module, settings)
    schedule = build_schedule(Schedule(), optimiser, steps=100, steps_per_epoch=10)
    for step in range(100):
        run = SimpleNamespace(optimiser=settings)
        trainer = SimpleNamespace(schedule=schedule, progress=Progress(step), run=run, optimiser=optimiser, steps=100)
        Trainer.set_rates(trainer)
        decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
        expected = 0.4 - 0.18 * (1 + math.cos(math.pi * step / 100))
        assert decays.pop(id(module[0].weight)) == pytest.approx(expected, rel=1e-12)
        assert set(decays.values()) == {0.0}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronised_batchnorm_is_the_plain_one_where_there_is_one_rank_more(monkeypatch, momentum):
    """Two ranks that hold the same rows have the statistics of one; gathering is played by doubling."""
    from trainer.engine import batchnorm

    monkeypatch.setattr(batchnorm, "world_size", lambda: 2)
    monkeypatch.setattr(batchnorm, "gather_rows", lambda x: torch.cat([x, x]))
    x = (100 + torch.randn(8, 3, 5, 5)).requires_grad_()  # far from zero, where a careless variance loses all digits
    plain, synchronised = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    synchronised = synchronise_batchnorm(synchronised, torch.device("cpu"))
    assert torch.allclose(synchronised(x), plain(x), atol=1e-4)
    assert torch.allclose(synchronised.running_mean, plain.running_mean)
    n = 8 * 25  # the unbiased variance of the joint batch has another count
    unbias = (2 * n / (2 * n - 1)) / (n / (n - 1))
    rate = 1.0 if momentum is None else momentum
    expected = (plain.running_var - (1 - rate)) * unbias + (1 - rate)
    assert torch.allclose(synchronised.running_var, expected, atol=1e-5)


def test_batchnorms_that_carry_an_activation_keep_it():
    from timm.layers import BatchNormAct2d

    x = torch.randn(8, 3, 5, 5)
    norm = synchronise_batchnorm(BatchNormAct2d(3), torch.device("cpu"))
    assert (norm(x) >= 0).all()


def test_compilation_takes_the_teachers_encoder_too():
    run = load_run("byol_cifar10_small", {"engine.kind": "ddp", "engine.compile": True})
    objective = place(build_objective(run), run.engine, look_around())
    compiled = {name for name, part in objective.named_modules() if part._compiled_call_impl is not None}
    assert compiled == {"backbone", "teacher.module"}

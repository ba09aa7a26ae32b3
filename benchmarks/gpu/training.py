"""Training: precision, fused ops, DDP, compilation and being killed must leave the losses as they are."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch

from benchmarks.gpu.images import drawn, on
from benchmarks.gpu.measure import exact
from benchmarks.gpu.ops import gram_formula, nt_xent_formula
from benchmarks.gpu.part import Check, Row, part
from benchmarks.gpu.views import Views
from trainer.config import load_run
from trainer.data.views import Batch
from trainer.engine.world import World

SMALL = {"model.args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}, "data.batch_size": 32}
# Plain SGD: Adam would divide rounding by small gradients and so multiply it.
BASE = {"engine.kind": "ddp", "engine.precision": "fp32", "optimiser.name": "sgd", "optimiser.lr": 0.05}
BASE |= {"model.backbone": "resnet18", "model.stem": "auto"}


class Training:
    """A run on one device, stepped by hand; CARE with shared views unless the recipe is another.

    Args:
        recipe, overrides: as for load_run.
        seed: of the initial weights.
    """

    def __init__(self, check: Check, overrides: dict | None = None, recipe: str = "care_cifar10", seed: int = 0) -> None:
        from trainer.engine.engine import build_engine, build_optimiser, place  # timm
        from trainer.objectives.objective import build_objective

        fixed = BASE | ({"objective.views": "shared"} if recipe.startswith("care") else {}) | (SMALL if check.small else {})
        self.run = load_run(recipe, fixed | (overrides or {}))
        self.world = World(0, 1, 0, 1, check.device)
        torch.manual_seed(seed)
        self.objective = place(build_objective(self.run), self.run.engine, self.world).train()
        optimiser = build_optimiser(self.objective, self.run.optimiser, self.run.engine)
        self.engine = build_engine(self.run, self.objective, optimiser, self.world)

    def step(self, batch: Batch) -> torch.Tensor:
        """One step; the loss stays on the device."""
        total = self.engine.forward(batch).total
        self.engine.backward(total)
        self.engine.step()
        return total.detach()

    def losses(self, batches: Iterator[Batch], steps: int) -> torch.Tensor:
        """Of so many steps."""
        return torch.stack([self.step(next(batches)) for _ in range(steps)]).double().cpu()


def torch_loader(training: Training, images: torch.Tensor, label: torch.Tensor, step: int = 0) -> Views:
    """Views that a run asks for of images on the device."""
    run, views = training.run, training.objective.views()
    options = {"batch_size": run.data.batch_size, "seed": 0, "mean": run.data.mean, "std": run.data.std}
    return Views(images, label, views, step=step, **options)


@part(limit_s=240, needs=("timm", "safetensors"))
def training(check: Check) -> Iterator[Row]:
    """Loss curves of CARE against each other: relative difference, largest of all steps; 0 is equal to the bit."""
    steps = 6 if check.small else 50
    images = on(check.device, *drawn(256 if check.small else 4096, 32))
    first = Training(check)

    def batches(step: int = 0) -> Views:
        return torch_loader(first, *images, step)

    def row(what: str, ours: torch.Tensor, reference: torch.Tensor, allowed: float, because: str) -> Row:
        apart = float(((ours - reference) / reference).abs().max())
        ends = {"first": float(ours[0]), "last": float(ours[-1])}
        return {
            "what": what,
            "steps": len(ours),
            **ends,
            "apart": apart,
            "allowed": allowed,
            "because": because,
            "ok": apart <= allowed,
        }

    with exact():
        plain = first.losses(batches(), steps)
        yield row("fp32, again", Training(check).losses(batches(), steps), plain, 0, "the same work")
        yield row(
            "formulas for ops", _with_formulas(check, batches(), steps), plain, 1e-3, "float32 rounding, grown by training"
        )
        yield row("bf16", Training(check, {"engine.precision": "bf16"}).losses(batches(), steps), plain, 0.03, "8 bits")
        yield row("DDP, one rank", _with_ddp(check, batches(), steps), plain, 1e-3, "float32 rounding, grown by training")
        yield row("killed, resumed", _resumed(check, batches, steps), plain, 0, "the same work")
        if not check.small:  # a minute on a CPU
            whole = Training(check, {"engine.compile": True}).losses(batches(), steps)
            yield row("encoder compiled", whole, plain, 1e-2, "float32 in another order, grown by training")


def _with_formulas(check: Check, batches: Iterator[Batch], steps: int) -> torch.Tensor:
    with ExitStack() as swapped:
        swapped.enter_context(patch("trainer.objectives.simclr.nt_xent", nt_xent_formula))
        swapped.enter_context(patch("trainer.objectives.care.gram_equivariance", gram_formula))
        return Training(check).losses(batches, steps)


def _with_ddp(check: Check, batches: Iterator[Batch], steps: int) -> torch.Tensor:
    """The engine wraps the module for a world of several ranks only; so it is told of two, and the group has one."""
    from trainer.engine.ddp import DDPEngine
    from trainer.engine.world import join, leave

    training = Training(check)
    join(training.world, expected_nodes=None, timeout_minutes=1)
    try:
        two = replace(training.world, size=2)
        training.engine = DDPEngine(training.run, training.objective, training.engine.optimiser, two)
        return training.losses(batches, steps)
    finally:
        leave()


def _resumed(check: Check, batches, steps: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Half of the steps, a checkpoint, everything forgotten, and the other half by other initial weights."""
    from trainer.checkpoint import Checkpoints, Progress

    folder, half = check.out / "checkpoints", steps // 2
    shutil.rmtree(folder, ignore_errors=True)
    before = Training(check)
    first = before.losses(batches(), half)
    Checkpoints(folder, before.run, before.world, 1).save(Progress(half), before.objective, before.engine, b"")
    del before
    after = Training(check, seed=1)
    checkpoints = Checkpoints(folder, after.run, after.world, 1)
    progress = checkpoints.load(checkpoints.newest(), after.objective, after.engine)
    return torch.cat([first, after.losses(batches(progress.step), steps - half)])

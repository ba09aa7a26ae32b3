"""Training: precision, fused ops, DDP, compilation and being killed must leave the losses as they are."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import Mock, patch

import torch

from benchmarks.gpu.images import drawn, on
from benchmarks.gpu.measure import exact
from benchmarks.gpu.ops import gram_formula, nt_xent_formula, rotation_formula
from benchmarks.gpu.part import Check, Row, part
from benchmarks.gpu.views import Views
from trainer.config import load_run
from trainer.data.views import Batch
from trainer.engine.world import World

SMALL = {"model.args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}, "data.batch_size": 32}
# Plain SGD: Adam would divide rounding by small gradients and so multiply it.
BASE = {"engine.kind": "ddp", "engine.precision": "fp32", "optimiser.name": "sgd", "optimiser.lr": 0.01}
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
        optimiser = build_optimiser(self.objective, self.run.optimiser)
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

    def row(what: str, ours: torch.Tensor, allowed: float, because: str, reference: torch.Tensor | None = None) -> Row:
        apart = float((ours / (plain if reference is None else reference) - 1).abs().max())
        row = {"what": what, "steps": steps, "first": float(ours[0]), "last": float(ours[-1]), "apart": apart}
        return row | {"allowed": allowed, "because": because, "ok": apart <= allowed}

    with exact():
        plain = first.losses(batches(), steps)
        control = row(
            "weights moved by 6e-8", _moved(check).losses(batches(), steps), torch.inf, "what training makes of rounding"
        )
        yield control | {"allowed": None, "ok": None}
        rounding = min(max(1e-6, 10 * control["apart"]), 0.02), "rounding: ten times the first row"
        yield row("fp32, again", Training(check).losses(batches(), steps), 0, "the same work")
        yield row("killed, resumed", _resumed(check, batches, steps), 0, "the same work")
        yield row("formulas for ops", _with_formulas(check, batches(), steps), *rounding)
        turning = {"objective.term": "rotation", "objective.weight": 1.0, "objective.reference_scale": False}
        by_svd = _with_formulas(check, batches(), steps, **turning)
        fit = max(1e-5, rounding[0]), "rounding; a fit's gradient is right to 1e-5"
        yield row("rotation term, formulas", Training(check, turning).losses(batches(), steps), *fit, by_svd)
        yield row("DDP, one rank", _with_ddp(check, batches(), steps), *rounding)
        if not check.small:  # a minute on a CPU
            yield row("encoder compiled", Training(check, {"engine.compile": True}).losses(batches(), steps), *rounding)
        yield row("bf16", Training(check, {"engine.precision": "bf16"}).losses(batches(), steps), 0.03, "8 bits of mantissa")


def _moved(check: Check) -> Training:
    """Initial weights multiplied by 1 + 6e-8 times normal numbers, float32's rounding."""
    training = Training(check)
    with torch.no_grad():
        for weights in training.objective.parameters():
            weights.mul_(1 + 6e-8 * torch.randn_like(weights))
    return training


def _with_formulas(check: Check, batches: Iterator[Batch], steps: int, **overrides: object) -> torch.Tensor:
    """The plain definitions in the places of the ops, which must have been asked."""
    contrastive, gram, rotation = Mock(wraps=nt_xent_formula), Mock(wraps=gram_formula), Mock(wraps=rotation_formula)
    terms = {"gram": gram, "rotation": rotation}
    with patch("trainer.objectives.simclr.nt_xent", contrastive), patch.dict("trainer.objectives.care.TERMS", terms):
        losses = Training(check, overrides).losses(batches, steps)
    if not (contrastive.called and (gram.called or rotation.called)):
        raise RuntimeError("the objective took its ops from elsewhere")
    return losses


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

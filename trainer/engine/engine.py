"""What the loop asks of an engine, and the making of one from settings."""

from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

from trainer.config import Engine as EngineSettings
from trainer.config import Optimiser, Run
from trainer.data.views import Batch
from trainer.engine.batchnorm import synchronise_batchnorm
from trainer.engine.world import World
from trainer.objectives.objective import Loss, Objective


class Engine(Protocol):
    """Computes gradients over all ranks and takes the optimiser's step.

    Attributes:
        sharded: whether every rank holds a part of the optimiser's state of its own (ZeRO 1 and 2).
    """

    sharded: bool

    def forward(self, batch: Batch) -> Loss:
        """The loss of this rank's rows."""

    def backward(self, total: Tensor) -> None:
        """Gradients, averaged over ranks."""

    def step(self) -> None:
        """Clip, update, forget the gradients."""

    def optimiser_state(self) -> dict[str, Any]:
        """Plain tensors and numbers: this rank's own where `sharded`, else equal on all ranks."""

    def load_optimiser_state(self, state: dict[str, Any]) -> None:
        """The inverse of `optimiser_state`, for the same number of ranks; the weights are loaded before."""


def build_engine(run: Run, objective: Objective, optimiser: torch.optim.Optimizer, world: World) -> Engine:
    """Wrap an objective that `place` has put on its device."""
    if run.engine.kind == "deepspeed":
        from trainer.engine.zero import DeepSpeedEngine  # importing deepspeed costs seconds

        return DeepSpeedEngine(run, objective, optimiser, world)
    from trainer.engine.ddp import DDPEngine

    return DDPEngine(run, objective, optimiser, world)


def place(objective: Objective, settings: EngineSettings, world: World) -> Objective:
    """Move an objective to this rank's device, in its memory format and precision, and compile it if asked."""
    if settings.sync_batchnorm:
        objective = synchronise_batchnorm(objective, world.device)
    objective.to(world.device)
    for part in objective.modules():
        if isinstance(part, Objective):
            part.bf16, part.channels_last = settings.precision == "bf16", settings.channels_last
            for encoder in part.encoders() if settings.compile else ():
                encoder.compile()
    return objective


def build_optimiser(objective: Objective, settings: Optimiser) -> torch.optim.Optimizer:
    """The timm optimiser of the settings; biases and norms carry no weight decay."""
    momentum: dict[str, Any] = {"momentum": settings.momentum} if settings.name in ("sgd", "lars") else {}
    name = {"sgd": "momentum"}.get(settings.name, settings.name)  # timm's "sgd" is Nesterov's
    return create_optimizer_v2(objective, name, lr=settings.lr, weight_decay=settings.weight_decay, **momentum)

"""The engine of torch's DistributedDataParallel; alone, of nothing but autograd."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import Run
from trainer.data.views import Batch
from trainer.engine.world import World
from trainer.objectives.objective import Loss, Objective

# Under channels_last the gradients of 1x1 convolutions come in another layout than the buckets': a copy, not an error.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


class DDPEngine:
    """Averages gradients over ranks as backward computes them."""

    sharded = False

    def __init__(self, run: Run, objective: Objective, optimiser: torch.optim.Optimizer, world: World) -> None:
        self.optimiser = optimiser
        self.clip_norm = run.optimiser.clip_norm
        # BatchNorm's running statistics stay each rank's own; rank 0's are saved, as the released code does.
        self.module: nn.Module = DistributedDataParallel(objective, broadcast_buffers=False) if world.size > 1 else objective

    def forward(self, batch: Batch) -> Loss:
        """The loss of this rank's rows."""
        return self.module(batch)

    def backward(self, total: Tensor) -> None:
        """Gradients, averaged over ranks."""
        total.backward()

    def step(self) -> None:
        """Clip, update, forget the gradients."""
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def optimiser_state(self) -> dict[str, Any]:
        """Equal on all ranks."""
        return self.optimiser.state_dict()

    def load_optimiser_state(self, state: dict[str, Any]) -> None:
        """The inverse of `optimiser_state`."""
        self.optimiser.load_state_dict(state)

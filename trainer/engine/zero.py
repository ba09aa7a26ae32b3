"""The engine of DeepSpeed: ZeRO stages 0 to 2."""

import logging
import os
from typing import Any

import torch
from torch import Tensor

from trainer.config import Run
from trainer.data.views import Batch
from trainer.engine.world import World
from trainer.objectives.objective import Loss, Objective

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed


class DeepSpeedEngine:
    """Gradients averaged by DeepSpeed; the optimiser's state partitioned over ranks from stage 1, gradients from 2."""

    def __init__(self, run: Run, objective: Objective, optimiser: torch.optim.Optimizer, world: World) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if world.device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled for 80 s; gloo serves
        self.optimiser = optimiser
        self.sharded = run.engine.zero_stage > 0
        config = {
            "train_batch_size": run.data.batch_size,
            "train_micro_batch_size_per_gpu": run.data.batch_size // world.size,
            "gradient_clipping": run.optimiser.clip_norm,
            "zero_optimization": {"stage": run.engine.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed insists, also where no launcher set it
        self.engine, *_ = deepspeed.initialize(model=objective, optimizer=optimiser, config=config)

    def forward(self, batch: Batch) -> Loss:
        """The loss of this rank's rows."""
        return self.engine(batch)

    def backward(self, total: Tensor) -> None:
        """Gradients, averaged over ranks."""
        self.engine.backward(total)

    def step(self) -> None:
        """Clip, update, forget the gradients."""
        self.engine.step()

    def optimiser_state(self) -> dict[str, Any]:
        """This rank's partition from stage 1; equal on all ranks before. Plain tensors: ZeRO's own state is pickled objects."""
        return self.optimiser.state_dict()

    def load_optimiser_state(self, state: dict[str, Any]) -> None:
        """The inverse of `optimiser_state`, for the same number of ranks; the weights are loaded before."""
        self.optimiser.load_state_dict(state)
        if self.sharded:
            self.engine.optimizer.refresh_fp32_params()

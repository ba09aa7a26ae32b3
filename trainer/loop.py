"""The training loop in plain order: batch, loss, backward, step, teacher, record, evaluate, save, stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from trainer.config import Run
from trainer.engine.world import World, join, leave, look_around
from trainer.errors import STOPPED
from trainer.prepare import Trainer, prepare

STOP_CHECK_EVERY = 8  # steps between asking all ranks whether one was told to stop


def train(run: Run, expected_nodes: int | None = None) -> int:
    """Train a run to its end, continuing it where its folder holds checkpoints.

    Args:
        run: the settings.
        expected_nodes: the promised number of nodes.

    Returns: exit code, 0 at the end of the run, STOPPED if it was told to stop and saved.

    Raises:
        UserError: bad input, a diverged loss, or a checkpoint that cannot be written.
    """
    world = look_around()
    join(world, expected_nodes=expected_nodes, timeout_minutes=run.engine.timeout_minutes)
    try:
        with stop_signals() as stop:
            return _train(prepare(run, world), stop)
    finally:
        leave()


def _train(trainer: Trainer, stop: "_Stop") -> int:
    run, progress, meter = trainer.run, trainer.progress, trainer.meter
    status: Literal["FINISHED", "KILLED", "FAILED"] = "FAILED"
    try:
        while progress.step < trainer.steps:
            batch = next(trainer.loader)
            trainer.set_rates()
            trainer.objective.before_step(progress.step / trainer.steps, progress.step / trainer.loader.steps_per_epoch)
            torch.manual_seed(_step_seed(run.seed, trainer.world.rank, progress.step))
            loss = trainer.engine.forward(batch)
            trainer.engine.backward(loss.total)
            trainer.engine.step()
            progress.step += 1
            trainer.objective.after_step()

            meter.step(progress.step, loss, trainer.optimiser.param_groups[0]["lr"], trainer.loader.wait_s)
            if progress.step % run.tracking.log_every == 0:
                meter.flush()
            if trainer.at_knn:
                trainer.measure()
            stopping = _agree(stop, trainer.world, progress.step)
            if stopping or trainer.at_save_point or trainer.at_knn:
                trainer.save()
            if stopping:
                status = "KILLED"
                meter.say(
                    f"stopped by {stop.name or 'another rank'} at step {progress.step}, saved; the same command continues"
                )
                return STOPPED
        status = "FINISHED"
        trainer.publish()
        meter.say(f"done: {progress.step} steps, {run.out}")
        return 0
    finally:
        meter.close()
        if meter.recorder:
            meter.recorder.close(status)


def _agree(stop: "_Stop", world: World, step: int) -> bool:
    """Whether any rank was told to stop: all ranks ask at the same steps, and so stop at the same one."""
    due = world.size == 1 or step % STOP_CHECK_EVERY == 0
    return due and world.any(stop.requested)


def _step_seed(seed: int, rank: int, step: int) -> int:
    """Seeds what the model draws (stochastic depth, dropout): a function of the step, so that resuming needs no state."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass
class _Stop:
    """What a signal asked for."""

    name: str = ""

    @property
    def requested(self) -> bool:
        return bool(self.name)


@contextmanager
def stop_signals() -> Iterator[_Stop]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for a save and an orderly end; a second Ctrl-C ends at once."""
    stop = _Stop()

    def ask(number: int, frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.name = signal.Signals(number).name

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

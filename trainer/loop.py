"""The life of a run: prepare or resume, then batch, loss, backward, step, teacher, record, evaluate, save, stop."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler

from trainer import __version__
from trainer.checkpoint import Checkpoints, Progress, check_settings
from trainer.config import Run, Schedule, flatten, to_tree
from trainer.data.loader import Loader, rank_batch_size
from trainer.data.shards import ShardFolder
from trainer.data.views import ViewSpec
from trainer.engine.engine import Engine, build_engine, build_optimiser, place
from trainer.engine.world import World, join, leave, look_around
from trainer.errors import STOPPED, UserError
from trainer.evaluation.features import extract
from trainer.evaluation.knn import knn_accuracy
from trainer.meter import Meter
from trainer.objectives.objective import Objective, build_objective
from trainer.tracking import Recorder, git_commit

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
            return _train(_prepare(run, world), stop)
    finally:
        leave()


def _train(run: "_Running", stop: "_Stop") -> int:
    settings, world, progress, meter = run.settings, run.world, run.progress, run.meter
    status = "FAILED"
    try:
        while progress.step < run.steps:
            batch = next(run.loader)
            run.schedule.step_update(progress.step)
            torch.manual_seed(_step_seed(settings.seed, world.rank, progress.step))
            loss = run.engine.forward(batch)
            run.engine.backward(loss.total)
            run.engine.step()
            progress.step += 1
            run.objective.after_step(progress.step / run.steps)

            meter.step(progress.step, loss, run.optimiser.param_groups[0]["lr"], run.loader.wait_s)
            if progress.step % settings.tracking.log_every == 0:
                meter.flush()
            if run.at_knn:
                meter.flush()
                run.measure()
            stopping = run.stop_agreed(stop)
            if stopping or run.at_save_point:
                run.save()
            if stopping:
                status = "KILLED"
                meter.say(f"stopped by {stop.name} at step {progress.step}, saved; the same command continues")
                return STOPPED
        status = "FINISHED"
        meter.say(f"done: {progress.step} steps, {settings.out}")
        return 0
    finally:
        meter.close()
        if meter.recorder:
            meter.recorder.close(status)


@dataclass
class _Running:
    """The parts of a run in motion."""

    settings: Run
    world: World
    loader: Loader
    objective: Objective
    optimiser: torch.optim.Optimizer
    engine: Engine
    schedule: CosineLRScheduler
    checkpoints: Checkpoints
    progress: Progress
    meter: Meter
    steps: int

    @property
    def at_knn(self) -> bool:
        every = self.settings.tracking.knn_every_epochs * self.loader.steps_per_epoch
        return self.progress.step == self.steps or bool(every) and self.progress.step % every == 0

    @property
    def at_save_point(self) -> bool:
        every = self.settings.checkpoint.every_steps or self.loader.steps_per_epoch
        return self.progress.step == self.steps or self.progress.step % every == 0

    def stop_agreed(self, stop: "_Stop") -> bool:
        """Whether any rank was told to stop: all ranks ask at the same steps, and so stop at the same one."""
        due = self.world.size == 1 or self.progress.step % STOP_CHECK_EVERY == 0
        return due and self.world.any(stop.requested)

    def save(self) -> None:
        """Make the record durable, check that the weights are worth keeping, and write a checkpoint."""
        self.meter.flush()
        broken = [n for n, p in self.objective.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            self.meter.diverged(self.progress.step, f"weights of {broken[0]}")
        if self.meter.recorder:
            self.meter.recorder.sync()
        path = self.checkpoints.save(self.progress, self.objective, self.engine, self.loader.state())
        self.meter.last_good = str(path)
        self.meter.pause()

    def measure(self) -> None:
        """kNN on the validation split (half of it is the bank): the number that names the best checkpoint."""
        knn = _validation_knn(self.settings, self.objective, self.world)
        if knn is None:
            return
        self.progress.note(knn)
        self.meter.say(f"step {self.progress.step}: kNN on the validation split {knn:.2f} %")
        if self.meter.recorder:
            self.meter.recorder.record("validation", self.progress.step, {"knn": knn})
        self.meter.pause()


def _prepare(run: Run, world: World) -> _Running:
    """Build every part of a run, from its newest checkpoint if it has one."""
    shards = ShardFolder.open(Path(run.data.shards) / "train")
    torch.manual_seed(run.seed)
    objective = build_objective(run)
    rows = rank_batch_size(run.data.batch_size, world.size, objective.views())
    folder = Path(run.out)
    checkpoints = Checkpoints(folder / "checkpoints", run, world, run.checkpoint.keep)
    if world.rank == 0:
        _open_folder(folder, run)
    checkpoints.clean()
    world.barrier()
    if not (folder / "settings.json").exists():
        raise UserError(f"rank {world.rank} does not see {folder}", "a folder on storage that all nodes share", "Set --out to one.")

    objective = place(objective, run.engine, world).train()
    optimiser = build_optimiser(objective, run.optimiser, run.engine)
    engine = build_engine(run, objective, optimiser, world)
    newest = checkpoints.newest()
    progress = checkpoints.load(newest, objective, engine) if newest else Progress()
    state = checkpoints.loader_state(newest) if newest else None
    loader = _loader(run, shards, objective.views(), world, rows, state=state)
    steps = max(1, math.ceil(run.schedule.epochs * loader.steps_per_epoch))
    schedule = build_schedule(run.schedule, optimiser, steps, loader.steps_per_epoch)
    recorder = None
    if world.rank == 0:
        tags = {"git_commit": git_commit(), "version": __version__, "world_size": str(world.size), "nodes": str(world.nodes)}
        recorder = Recorder(folder, run.tracking, flatten(to_tree(run)), tags)
    meter = Meter(world, recorder, steps, loader.steps_per_epoch, run.data.batch_size, last_good=str(newest or "none"))
    start = f"continuing {newest}" if newest else "starting"
    world.say(f"{run.recipe}: {start}; {steps} steps of {run.data.batch_size} images on {world.size} rank(s), {world.nodes} node(s)")
    return _Running(run, world, loader, objective, optimiser, engine, schedule, checkpoints, progress, meter, steps)


def build_schedule(settings: Schedule, optimiser: torch.optim.Optimizer, steps: int, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, then a half cosine to `min_lr`, or the peak throughout; a pure function of the step."""
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    peak = optimiser.param_groups[0]["lr"]
    return CosineLRScheduler(
        optimiser,
        t_initial=max(1, steps - warmup),
        lr_min=settings.min_lr if settings.name == "cosine" else peak,
        warmup_t=warmup,
        warmup_lr_init=peak / max(1, warmup),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _open_folder(folder: Path, run: Run) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(folder, run)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})", "a writable folder", "Set --out to one.") from error


def _validation_knn(run: Run, objective: Objective, world: World) -> float | None:
    """kNN accuracy on the validation split, per cent; even images are the bank, odd ones the queries."""
    path = Path(run.data.shards) / "val"
    if not path.exists():
        return None
    view = ViewSpec("plain", 1, run.data.size, None)
    features = extract(objective, _loader(run, ShardFolder.open(path), [view], world, run.data.batch_size // world.size, shuffle=False))
    values, label, even = features.values["plain"][0], features.label, features.index % 2 == 0
    return None if (label < 0).any() else knn_accuracy(values[even], label[even], values[~even], label[~even])


def _loader(run: Run, shards: ShardFolder, views: list[ViewSpec], world: World, rows: int, **options: Any) -> Loader:
    return Loader(
        shards,
        views,
        batch_size=rows,
        seed=run.seed,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        threads=run.data.threads,
        mean=run.data.mean,
        std=run.data.std,
        shuffle_buffer=run.data.shuffle_buffer,
        **options,
    )


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

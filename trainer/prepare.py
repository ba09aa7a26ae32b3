"""Everything a run needs, built from its settings or taken up from its newest checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler

from trainer import __version__
from trainer.checkpoint import Checkpoints, Progress, check_settings, open_folder
from trainer.config import Run, Schedule, flatten, remarks, to_tree
from trainer.data.loader import Loader, rank_batch_size
from trainer.data.shards import ShardFolder
from trainer.data.views import ViewSpec
from trainer.engine.engine import Engine, build_engine, build_optimiser, place
from trainer.engine.world import World
from trainer.evaluation.features import extract
from trainer.evaluation.knn import knn_accuracy
from trainer.meter import Meter
from trainer.models.momentum import cosine
from trainer.objectives.objective import Objective, build_objective
from trainer.tracking import Recorder, git_commit


@dataclass
class Trainer:
    """The parts of a run, and what the loop does with several of them at once."""

    run: Run
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
    lock: object

    @property
    def at_knn(self) -> bool:
        """Whether the validation split is measured after this step."""
        every = self.run.tracking.knn_every_epochs * self.loader.steps_per_epoch
        return self.progress.step == self.steps or (bool(every) and self.progress.step % every == 0)

    @property
    def at_save_point(self) -> bool:
        """Whether a checkpoint is due after this step."""
        every = self.run.checkpoint.every_steps or self.loader.steps_per_epoch
        return self.progress.step == self.steps or self.progress.step % every == 0

    def set_rates(self) -> None:
        """Learning rate and weight decay of the step to come; pure functions of it."""
        self.schedule.step_update(self.progress.step)
        decay = self.run.optimiser.weight_decay_end
        if decay:
            set_weight_decay(self.optimiser, cosine(self.run.optimiser.weight_decay, decay, self.progress.step / self.steps))

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

    def publish(self) -> None:
        """Hand the last checkpoint, with its settings, to MLflow."""
        if self.meter.recorder:
            self.meter.recorder.artifact(Path(self.meter.last_good), "checkpoint")

    def measure(self) -> None:
        """kNN on the validation split: the number that names the best checkpoint."""
        self.meter.flush()
        knn = _validation_knn(self.run, self.objective, self.world)
        if knn is None:
            return
        self.progress.note(knn)
        self.meter.say(f"step {self.progress.step}: kNN on the validation split {knn:.2f} %")
        if self.meter.recorder:
            self.meter.recorder.record("validation", self.progress.step, {"knn": knn})
        self.meter.pause()


def prepare(run: Run, world: World) -> Trainer:
    """Build every part of a run, from its newest checkpoint if it has one. Nothing is written until all of it is there."""
    shards = ShardFolder.open(Path(run.data.shards) / "train")
    torch.manual_seed(run.seed)
    objective = build_objective(run)
    rows = rank_batch_size(run.data.batch_size, world.size, objective.views())
    objective = place(objective, run.engine, world).train()
    optimiser = build_optimiser(objective, run.optimiser)
    folder = Path(run.out)
    check_settings(folder, run)
    checkpoints = Checkpoints(folder / "checkpoints", run, world, run.checkpoint.keep)
    newest = checkpoints.newest()
    loader = _loader(run, shards, objective.views(), world, rows, state=checkpoints.loader_state(newest) if newest else None)
    steps = max(1, math.ceil(run.schedule.epochs * loader.steps_per_epoch))
    schedule = build_schedule(run.schedule, optimiser, steps, loader.steps_per_epoch)  # before a saved rate is loaded
    engine = build_engine(run, objective, optimiser, world)
    progress = checkpoints.load(newest, objective, engine) if newest else Progress()
    lock = open_folder(folder, run, world)
    checkpoints.clean()
    recorder = None
    if world.rank == 0:
        tags = {"git_commit": git_commit(), "version": __version__, "world_size": str(world.size), "nodes": str(world.nodes)}
        recorder = Recorder(folder, run.tracking, flatten(to_tree(run)), tags)
    meter = Meter(world, recorder, steps, loader.steps_per_epoch, run.data.batch_size, last_good=str(newest or "none"))
    start, where = f"continuing {newest}" if newest else "starting", f"{world.size} rank(s), {world.nodes} node(s)"
    world.say(f"{run.recipe}: {start}; {steps} steps of {run.data.batch_size} images on {where}")
    for remark in remarks(run):
        world.say(f"note: {remark}")
    return Trainer(run, world, loader, objective, optimiser, engine, schedule, checkpoints, progress, meter, steps, lock)


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


def set_weight_decay(optimiser: torch.optim.Optimizer, weight_decay: float) -> None:
    """Of the parameters that are decayed at all."""
    for group in optimiser.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay


def _validation_knn(run: Run, objective: Objective, world: World) -> float | None:
    """kNN accuracy on the validation split, per cent; even images are the bank, odd ones the queries."""
    path = Path(run.data.shards) / "val"
    if not path.exists():
        return None
    view = ViewSpec("plain", 1, run.data.size, None)
    if world.size > 1:  # without SyncBN every rank has running statistics of its own; rank 0's are the ones that are saved
        for buffer in objective.buffers():
            torch.distributed.broadcast(buffer, 0)
    batches = _loader(run, ShardFolder.open(path), [view], world, run.data.batch_size // world.size, shuffle=False)
    features = extract(objective, batches)["full"]
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

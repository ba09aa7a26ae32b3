"""What a step says of itself: losses, speed, waiting, collapse; to the record, to the screen, and to stop a diverged run."""

import math
import sys
import time
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from trainer.engine.world import World, gather_rows
from trainer.errors import DIVERGED, UserError
from trainer.evaluation.geometry import effective_rank
from trainer.objectives.objective import Loss
from trainer.tracking import Recorder, system_metrics

COLLAPSED = 2.0  # effective rank of the embeddings below which the run is warned about: they lie on a line
SYSTEM_EVERY_S = 10.0  # between records of the machine's load
LINE_EVERY_S = 10.0  # between lines where the output is no terminal


@dataclass
class Meter:
    """Collects steps without waiting for the device, and reads them out at every `flush`.

    Args:
        world: who takes part.
        recorder: writes the record, on rank 0; None elsewhere.
        steps, steps_per_epoch: length of the run and of an epoch.
        batch_size: images per step over all ranks.
    """

    world: World
    recorder: Recorder | None
    steps: int
    steps_per_epoch: int
    batch_size: int
    last_good: str = "none"
    _pending: "list[_Step]" = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _embedding: Tensor = field(default_factory=lambda: torch.zeros(0, 1))
    _since: float = field(default_factory=time.perf_counter)
    _system_at: float = float("-inf")
    _display: "_Display | None" = None

    def step(self, step: int, loss: Loss, lr: float, wait_s: float) -> None:
        """Note a step: nothing is read from the device here."""
        self._names = ["loss", *(f"terms/{name}" for name in loss.terms)]
        self._pending.append(_Step(step, lr, wait_s, torch.stack([loss.total.detach(), *loss.terms.values()])))
        self._embedding = loss.embeddings[0].detach()

    def flush(self) -> None:
        """Record the steps noted since the last flush.

        Raises:
            UserError: a loss was not finite on some rank; with the step, its terms and the last good checkpoint.
        """
        if not self._pending:
            return
        rows = self.world.mean(torch.stack([step.losses for step in self._pending])).tolist()
        elapsed = time.perf_counter() - self._since
        records = [
            dict(zip(self._names, row, strict=True)) | {"lr": step.lr, "epoch": step.number / self.steps_per_epoch}
            for step, row in zip(self._pending, rows, strict=True)
        ]
        records[-1] |= {
            "images_per_s": self.batch_size * len(rows) / elapsed,
            "data_wait": sum(step.wait_s for step in self._pending) / elapsed,
            "effective_rank": self._effective_rank(),
        }
        for step, row, record in zip(self._pending, rows, records, strict=True):
            if self.recorder:
                self.recorder.record("train", step.number, record)
            if not all(map(math.isfinite, row)):
                losses = zip(self._names, row, strict=True)
                self.diverged(step.number, ", ".join(f"{name} {value:.4g}" for name, value in losses))
        last = self._pending[-1].number
        self._record_system(last)
        self._show(last, records[-1])
        if records[-1]["effective_rank"] < COLLAPSED:
            self.say(f"warning: step {last}: embeddings have collapsed, effective rank {records[-1]['effective_rank']:.2f}")
        self._pending.clear()
        self._since = time.perf_counter()

    def _effective_rank(self) -> float:
        """Of the joint batch's embeddings, which all ranks gather and rank 0 measures."""
        embedding = gather_rows(self._embedding.float())
        return effective_rank(embedding) if self.world.rank == 0 else math.inf

    def pause(self) -> None:
        """Forget the time since the last flush: it was spent on evaluating or saving."""
        self._since = time.perf_counter()

    def say(self, text: str) -> None:
        """A line on the screen of rank 0, above the bar."""
        if self.world.rank == 0:
            if self._display and self._display.live:
                self._display.bar.console.print(text)
            else:
                print(text, flush=True)

    def close(self) -> None:
        """Leave the screen as it should be."""
        if self._display:
            self._display.bar.stop()

    def _record_system(self, step: int) -> None:
        if self.recorder and time.monotonic() - self._system_at > SYSTEM_EVERY_S:
            self.recorder.record("system", step, system_metrics())
            self._system_at = time.monotonic()

    def _show(self, step: int, record: dict[str, float]) -> None:
        if self.world.rank == 0:
            self._display = self._display or _Display(self.steps, step - len(self._pending), self.batch_size)
            self._display.show(step, record)

    def diverged(self, step: int, what: str) -> None:
        """End a run whose numbers are not finite any more."""
        if self.recorder:
            self.recorder.sync()
        raise UserError(
            f"step {step} is not finite ({what}); last good checkpoint: {self.last_good}",
            "finite losses and weights",
            "Lower optimiser.lr, set optimiser.clip_norm, or use engine.precision fp32; then start again from that checkpoint.",
            code=DIVERGED,
        )


@dataclass(frozen=True)
class _Step:
    """A step that was not read out yet; its losses, [terms], are still on the device."""

    number: int
    lr: float
    wait_s: float
    losses: Tensor


class _Display:
    """A live bar on a terminal, else a line now and then."""

    def __init__(self, steps: int, done: int, batch_size: int) -> None:
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[text]}"))
        self.task = self.bar.add_task("train", total=steps, completed=done, text="")
        self.live = sys.stdout.isatty()
        self.steps, self.batch_size, self.last_line = steps, batch_size, float("-inf")
        if self.live:
            self.bar.start()

    def show(self, step: int, record: dict[str, float]) -> None:
        losses = {name.removeprefix("terms/"): value for name, value in record.items() if name == "loss" or "terms/" in name}
        terms = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        waiting, rank = f"{record['data_wait']:.0%} waiting for data", f"rank {record['effective_rank']:.1f}"
        text = f"{terms} | {record['images_per_s']:.0f} img/s, {waiting}, {rank}"
        self.bar.update(self.task, completed=step, text=text)
        now = time.monotonic()
        if not self.live and (now - self.last_line > LINE_EVERY_S or step == self.steps):
            eta = (self.steps - step) * self.batch_size / record["images_per_s"]
            print(f"step {step}/{self.steps} | {text} | ETA {eta:.0f} s", flush=True)
            self.last_line = now

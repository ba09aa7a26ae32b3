"""The parts of the GPU check: what they are, how one is run within its time, and the record of what came of them."""

import importlib.util
import inspect
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]  # a line of a part's table; "ok" False makes the part fail
PARTS: "dict[str, Part]" = {}
FORK = multiprocessing.get_context("fork")  # cheap; sound because this process itself computes nothing


@dataclass
class Check:
    """What every part is given.

    Args:
        device: the GPU, else the CPU.
        small: sizes for a CPU, which test the script and measure nothing.
        data: folder with CIFAR-10, if there is one.
        out: folder for what a part writes.
        seed: of the random inputs.
        outcomes: of the parts before, by name.
    """

    device: torch.device
    small: bool
    data: Path | None
    out: Path
    seed: int
    outcomes: dict[str, dict] = field(default_factory=dict)

    def ceiling(self, name: str) -> float | None:
        """What the part `ceilings` measured, per second; None before it."""
        rows = self.outcomes.get("ceilings", {}).get("rows", [])
        return next((row["per_s"] for row in rows if row["ceiling"] == name), None)


class Skipped(Exception):
    """A part cannot run here; the message says why."""


@dataclass(frozen=True)
class Part:
    """A generator of rows.

    Args:
        run: from a Check to rows; its docstring's first line is the title of the table.
        limit_s: it is ended after this time.
        needs: modules it cannot do without.
        gpu: on a CPU it runs with --small only.
    """

    run: Callable[[Check], Iterator[Row]]
    limit_s: float
    needs: tuple[str, ...]
    gpu: bool

    @property
    def title(self) -> str:
        """Of its table."""
        return (inspect.getdoc(self.run) or "").partition("\n")[0]

    def outcome(self, check: Check) -> dict:
        """Run to the end, an error, a crash or the limit: status, reason, rows, seconds.

        In a process of its own: a kernel that hangs can then be ended, and one that breaks the GPU's context breaks no more.
        """
        start, rows, end = time.perf_counter(), [], None
        receiver, sender = FORK.Pipe(duplex=False)
        child = FORK.Process(target=self._work, args=(check, sender))
        child.start()
        sender.close()
        while end is None:
            if not receiver.poll(max(0.0, start + self.limit_s - time.perf_counter())):
                child.kill()
                end = {"status": "FAILED", "reason": f"not done after its {self.limit_s:g} s"}
                break
            try:
                row, end = receiver.recv()
                rows += [row] if row else []
            except EOFError:
                child.join()
                end = {"status": "FAILED", "reason": f"its process died with exit code {child.exitcode}"}
        child.join()
        wrong = [row for row in rows if row.get("ok") is False]
        if wrong and end["status"] == "passed":
            end = {"status": "FAILED", "reason": f"{len(wrong)} of {len(rows)} rows are not ok"}
        about = {"title": self.title, "seconds": time.perf_counter() - start, "seed": check.seed, "rows": rows}
        return end | about | {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}

    def _work(self, check: Check, sender: Connection) -> None:
        """Send (row, None) for every row, then (None, status and reason)."""
        end = {"status": "passed", "reason": ""}
        try:
            self._refuse(check)
            torch.manual_seed(check.seed)
            for row in self.run(check):
                sender.send((row, None))
        except Skipped as why:
            end = {"status": "skipped", "reason": str(why)}
        except Exception as error:
            end = {"status": "FAILED", "reason": one_line(error), "traceback": traceback.format_exc()}
        sender.send((None, end))

    def _refuse(self, check: Check) -> None:
        if self.gpu and check.device.type == "cpu" and not check.small:
            raise Skipped("no GPU (--small runs its logic on the CPU)")
        if missing := [module for module in self.needs if not installed(module)]:
            raise Skipped(f"{' and '.join(missing)} not installed")


def part(limit_s: float, needs: tuple[str, ...] = (), gpu: bool = True) -> Callable:
    """Decorator: make a generator of rows a part under its own name."""

    def add(run: Callable[[Check], Iterator[Row]]) -> Callable[[Check], Iterator[Row]]:
        PARTS[run.__name__] = Part(run, limit_s, needs, gpu)
        return run

    return add


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@dataclass
class Record:
    """The outcomes by part, in a JSON file that is whole after every part.

    Args:
        path: of the file.
        machine: what every outcome in it was measured on.
    """

    path: Path
    machine: dict
    outcomes: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, machine: dict, fresh: bool) -> "Record":
        """Go on from the file, or start it."""
        kept = json.loads(path.read_text())["parts"] if path.exists() and not fresh else {}
        return cls(path, machine, kept)

    def passed(self, name: str) -> bool:
        """Whether a part passed at the present commit."""
        outcome = self.outcomes.get(name, {})
        return outcome.get("status") == "passed" and outcome.get("commit") == self.machine["commit"]

    def add(self, name: str, outcome: dict) -> None:
        """Keep an outcome, at once."""
        self.outcomes[name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"machine": self.machine, "parts": self.outcomes}, indent=1))
        os.replace(unfinished, self.path)


def table(rows: list[Row]) -> str:
    """Aligned columns, as many as the rows have keys."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )

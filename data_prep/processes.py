"""Runs jobs in several processes under a progress bar, and ends them cleanly when the parent is stopped or killed."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from trainer.errors import UserError

console = Console(stderr=True, soft_wrap=True, highlight=False)
_function: Callable[..., Any]  # of a worker process, inherited: only job numbers and results pass through a pipe
_jobs: list[tuple]


class _Speed(ProgressColumn):
    """Images and shards per second, of late."""

    def __init__(self, shards_per_image: float) -> None:
        super().__init__()
        self._shards_per_image = shards_per_image

    def render(self, task: Task) -> Text:
        """Empty until a shard is done."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} images/s, {speed * self._shards_per_image:.2f} shards/s" if speed else "")


def run(title: str, workers: int | None, function: Callable[..., Any], jobs: list[tuple], images: list[int]) -> list[Any]:
    """function(*job) of every job.

    Args:
        title: stands before the bar.
        workers: number of processes, None for one per core; 1 works in this process.
        function, jobs: the function and the arguments of each call. Forked processes inherit both, however large.
        images: how many images each job is, for the bar.

    Returns: the results in the order of `jobs`.

    Raises:
        UserError: a process was killed, by lack of memory most likely.
    """
    done = _here if workers == 1 or len(jobs) < 2 else _forked  # forked before the bar starts its thread
    results = done(workers or len(os.sched_getaffinity(0)), function, jobs)
    speed = _Speed(len(jobs) / max(1, sum(images)))
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("images"), speed, TimeRemainingColumn())
    found = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=sum(images))
        for number, result in results:
            found[number] = result
            progress.advance(task, images[number])
    return [found[number] for number in range(len(jobs))]


def _here(workers: int, function: Callable[..., Any], jobs: list[tuple]) -> Iterator[tuple[int, Any]]:
    return ((number, function(*job)) for number, job in enumerate(jobs))


def _forked(workers: int, function: Callable[..., Any], jobs: list[tuple]) -> Iterator[tuple[int, Any]]:
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("fork"), _begin_worker, (function, jobs, os.getpid()))
    return _finished(pool, {pool.submit(_work, number): number for number in range(len(jobs))})


def _finished(pool: ProcessPoolExecutor, futures: dict[Future, int]) -> Iterator[tuple[int, Any]]:
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed", "enough memory", "Use fewer --workers; the same command goes on."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(function: Callable[..., Any], jobs: list[tuple], parent: int) -> None:
    global _function, _jobs
    _function, _jobs = function, jobs
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all: end quietly, the parent speaks
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans when the parent is killed
    if os.getppid() != parent:
        os._exit(1)


def _work(number: int) -> Any:
    return _function(*_jobs[number])

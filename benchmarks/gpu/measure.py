"""Time, memory and errors of a piece of work on a device."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, spend_s: float = 0.3) -> float:
    """Median time of one call; on a GPU by events, with the cache emptied before each (triton's do_bench)."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(work, warmup=int(200 * spend_s), rep=int(1000 * spend_s), return_mode="median") / 1e3
    work()
    times, end = [], time.perf_counter() + spend_s
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a call takes at most, beyond what was taken before; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference|| in float64; inf unless all of ours is finite."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    if ours.shape != reference.shape or not ours.isfinite().all():
        return float("inf")
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-300))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing has written reads as nan, so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # the mode in which torch fills new memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def exact() -> Iterator[None]:
    """The same algorithm for the same work, and float32 products in float32: runs can be compared bit by bit."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before

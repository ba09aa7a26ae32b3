"""Training throughput: CARE steps of three encoders, and what the loader costs of them."""

import os
import time
from collections.abc import Iterator
from itertools import cycle

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.images import drawn, on, shards
from benchmarks.gpu.measure import wait
from benchmarks.gpu.part import Check, Row, installed, part
from benchmarks.gpu.training import Training, torch_loader
from trainer.data.loader import Loader
from trainer.data.shards import ShardFolder
from trainer.data.views import Batch, ViewSpec

FAST = {"engine.precision": "bf16"}
CASES = [("resnet18", 32, 512), ("resnet18", 32, 1024), ("resnet50", 224, 256), ("vit_small_patch16_224", 224, 256)]
TINY = [("resnet18", 32, 32), ("vit_tiny_patch16_224", 64, 32)]


@part(limit_s=240, needs=("timm",))
def throughput(check: Check) -> Iterator[Row]:
    """CARE steps, shared views, bf16, channels_last: images of the batch a second; every image is encoded twice."""
    for backbone, size, batch in TINY if check.small else CASES:
        model = {"model.backbone": backbone} | ({} if "resnet" in backbone and check.small else {"model.args": {}})
        training = Training(check, FAST | model | {"data.size": size, "data.batch_size": batch})
        views = training.objective.views()
        with FlopCounterMode(display=False) as counter:  # the first step, which also warms up
            training.step(random_batch(views, batch, check.device))
        held = steps_per_s(training, cycle([random_batch(views, batch, check.device)]), check)
        row = {"encoder": backbone, "px": size, "batch": batch, "images/s": held * batch, "ms": 1e3 / held}
        rate, ceiling = held * counter.get_total_flops(), check.ceiling("bf16")
        row |= {"TFLOP/s": rate / 1e12, "of bf16 ceiling": rate / ceiling if ceiling else None}
        if check.device.type == "cuda":
            row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        loader, name = stream(check, training)
        fed = steps_per_s(training, loader, check) if loader else None
        yield row | {"loader": name, "images/s fed": fed and fed * batch, "waiting": fed and max(0.0, 1 - fed / held)}
        del training, loader


def stream(check: Check, training: Training) -> tuple[Iterator[Batch] | None, str]:
    """Batches of drawn images: DALI's from shards; else, at 32 px, torch's from memory."""
    size, batch = training.run.data.size, training.run.data.batch_size
    tiny, n = size <= 64, (2 if check.small else 4) * batch
    if installed("nvidia.dali"):
        side, extension = (size, "png") if tiny else (256, "jpg")
        folder = shards(*drawn(n, side), check.out / f"drawn-{side}-{n}", extension)
        return dali_loader(check, training, folder), f"DALI, {extension} of {side} px"
    if tiny:
        return torch_loader(training, *on(check.device, *drawn(n, size))), "torch on the device (no DALI)"
    return None, "none: noise as views (no DALI)"


def dali_loader(check: Check, training: Training, folder: ShardFolder) -> Loader:
    """Views that a run asks for of a folder of shards."""
    data = training.run.data
    options = {"batch_size": data.batch_size, "seed": 0, "mean": data.mean, "std": data.std, "threads": os.cpu_count()}
    return Loader(folder, training.objective.views(), device=check.device, **options)


def random_batch(views: list[ViewSpec], batch: int, device: torch.device) -> Batch:
    """Views of noise, made on the device."""
    noise = {v.name: torch.randn(v.count, batch, 3, v.size, v.size, device=device) for v in views}
    return Batch(noise, torch.arange(batch), torch.zeros(batch, dtype=torch.int64))


def steps_per_s(training: Training, batches: Iterator[Batch], check: Check) -> float:
    """Over a few seconds, after some steps to warm up."""

    def spent(steps: int) -> float:
        wait(check.device)
        start = time.perf_counter()
        for _ in range(steps):
            training.step(next(batches))
        wait(check.device)
        return time.perf_counter() - start

    warm, spend_s = (1, 0.1) if check.small else (10, 4.0)
    spent(warm)
    steps = 1 + int(spend_s * warm / spent(warm))
    return steps / spent(steps)

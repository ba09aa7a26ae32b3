"""The data path on the GPU: DALI's graph there against the same graph on the CPU, repetition and resuming."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.images import drawn, on, shards
from benchmarks.gpu.part import Check, Row, part
from benchmarks.gpu.views import make
from trainer.config import Augmentation
from trainer.data.loader import Loader
from trainer.data.shards import ShardFolder
from trainer.data.views import Batch, ViewSpec

NOTHING = Augmentation(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=0)
STAGES = {  # what is drawn, and the allowed mean difference of 255 with its reason
    "decode": (None, 0.0, "PNG is lossless"),
    "crop": (replace(NOTHING, crop_scale=(0.2, 1.0), crop_ratio=(0.75, 4 / 3)), 0.3, "rounding of interpolated pixels"),
    "blur": (replace(NOTHING, blur=1.0), 0.3, "rounding"),
    "flip": (replace(NOTHING, flip=1.0), 0.0, "no arithmetic"),
    "colour": (replace(NOTHING, jitter=1.0, grayscale=0.2), 0.01, "float32 on both"),
    "all": (Augmentation(), 1.0, "rounding, moved by the colours"),
}
UNIT = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # views in 0..255


@part(limit_s=120, needs=("nvidia.dali",))
def dali(check: Check) -> Iterator[Row]:
    """DALI on the GPU against the CPU: mean and largest difference of 255; then repeating and resuming, bit by bit."""
    n = 64 if check.small else 256
    pictures = drawn(2 * n, 32)
    folder, (images, _) = shards(*pictures, check.out / f"drawn-32-{2 * n}"), on(check.device, *pictures)
    for stage, (augmentation, mean, reason) in STAGES.items():
        view = ViewSpec("v", 2, 32, augmentation)
        reference = next(_loader(folder, view, n, "cpu"))
        if check.device.type == "cuda":
            yield _apart(f"{stage}, GPU", next(_loader(folder, view, n, check.device)), reference, mean, reason)
        if augmentation:
            ours = make(images[reference.index.to(check.device)], view, reference.draws["v"], **UNIT)
            ours = replace(reference, views={"v": ours})
            yield _apart(f"{stage}, torch's views", ours, reference, max(mean, 0.3), f"{reason}; what serves without DALI")
    if check.device.type == "cuda":
        folder, view = shards(*drawn(n, 256), check.out / f"drawn-256-{n}", "jpg"), ViewSpec("v", 1, 224, None)
        ours, reference = (next(_loader(folder, view, n // 2, device)) for device in (check.device, "cpu"))
        yield _apart("JPEG at 224 px, GPU", ours, reference, 2.0, "two decoders interpolate chroma differently")
    yield from _repeats(folder, view, n // 2, check.device)


def _repeats(folder: ShardFolder, view: ViewSpec, n: int, device: torch.device) -> Iterator[Row]:
    first, second = (_loader(folder, view, n, device) for _ in range(2))
    yield _equal("two loaders, 5 batches", first, second)
    yield _equal("resumed after them, 5 more", first, _loader(folder, view, n, device, state=first.state()))


def _equal(what: str, first: Loader, second: Loader) -> Row:
    equal = True
    for _ in range(5):
        a, b = next(first), next(second)
        equal &= torch.equal(a.index, b.index) and torch.equal(a.views["v"], b.views["v"])
    return {"what": what, "bits equal": equal, "ok": equal}


def _apart(what: str, ours: Batch, reference: Batch, mean: float, reason: str) -> Row:
    apart = (ours.views["v"].cpu() - reference.views["v"]).abs()
    ok = torch.equal(ours.index.cpu(), reference.index) and bool(apart.mean() <= mean)
    return {
        "what": what,
        "mean": float(apart.mean()),
        "largest": float(apart.max()),
        "allowed": mean,
        "because": reason,
        "ok": ok,
    }


def _loader(folder: ShardFolder, view: ViewSpec, n: int, device: torch.device | str, state: bytes | None = None) -> Loader:
    return Loader(folder, [view], batch_size=n, seed=1, device=device, state=state, **UNIT)

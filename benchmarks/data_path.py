"""How much faster than torchvision does the data path make views: SimCLR's pairs, CLeVER's turned ones, DINO's multi-crop?

    python benchmarks/data_path.py [--shards32 DIR] [--shards160 DIR] [--rounds 3] [--json FILE]

Four pipelines take turns in every round: ours with draws per image and with draws shared by a group (CARE), and torchvision
v2 in a DataLoader of two workers, on PIL images and on uint8 tensors. All decode the same images of the same shards (the
DataLoader holds them encoded in memory) and do the same work, as far as the case has it: crop, flip, rotation, elastic
transform, colour jitter, grayscale, blur, solarisation, normalisation. (Beyond the border of a turned view ours mirror it,
torchvision's are black.) CPU time is that of the process and its workers.
"""

import io
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path

import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from trainer.config import Augmentation, Data
from trainer.data.shards import ShardFolder, read_index
from trainer.data.views import ViewSpec
from trainer.errors import UserError, exit_with_one_line

THREADS = 2  # of DALI, and workers of the DataLoader
WARM = 5  # batches: more than a DataLoader of two workers holds ready
SIMCLR = Augmentation()
DINO = Augmentation(
    crop_scale=(0.4, 1.0),
    saturation=0.2,
    blur=1.0,
    second={"blur": 0.1, "solarize": 0.2},
    local={"crop_scale": [0.05, 0.4], "blur": 0.5},
)
MULTI_CROP = (ViewSpec("base", 2, 224, DINO.pair()), ViewSpec("local", 8, 96, DINO.variant("local")))
OURS = ("ours, draws per image", "ours, draws shared by a group")
THEIRS = ("torchvision v2 on PIL", "torchvision v2 on uint8 tensors")


def benchmark(shards32: str | None = None, shards160: str | None = None, rounds: int = 3, json: str | None = None) -> None:
    """Time the four pipelines.

    Args:
        shards32: folder with a train split of 32-pixel images; default: CIFAR-10 of CARE_SHARED_DATA (or ../shared/data).
        shards160: the same with 160 pixels; default: Imagenette of the same place.
        rounds: turns that each pipeline takes; the median counts.
        json: file to write the numbers to as well.
    """
    small = ShardFolder.open(Path(shards32 or cifar10()) / "train")
    large = ShardFolder.open(Path(shards160 or imagenette()) / "train")
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    console, cases = Console(width=120), {}
    for name, folder, views, batch_size, batches in [
        ("32 px", small, pair(32, SIMCLR), 256, 6),
        ("160 px", large, pair(160, SIMCLR), 32, 6),
        ("224 px", large, pair(224, SIMCLR), 32, 5),
        ("32 px, CAug+", small, pair(32, replace(DINO, rotation=90, elastic=0.5)), 256, 3),
        ("2 x 224 + 8 x 96 px", large, MULTI_CROP, 16, 3),
    ]:
        cases[name] = case = compare(folder, views, batch_size, batches, rounds)
        title = f"{name}: views of {case['images']}, batch {batch_size}, median of {rounds}; {machine}"
        console.print(as_table(case["pipelines"], title))
    if json:
        Path(json).write_text(dumps({"machine": machine, "threads": THREADS, "rounds": rounds, "cases": cases}, indent=1))


def pair(size: int, augmentation: Augmentation) -> tuple[ViewSpec]:
    """Two views of one size."""
    return (ViewSpec("views", 2, size, augmentation.pair()),)


def compare(folder: ShardFolder, views: Sequence[ViewSpec], batch_size: int, batches: int, rounds: int) -> dict:
    """Images/s and CPU-ms per image of the four pipelines, taking turns; ours is given four times the batches."""
    encoded = read_images(folder)
    # The DataLoaders fork their workers before DALI starts its threads.
    streams = {name: iter(theirs(encoded, views, batch_size, name == THEIRS[0])) for name in THEIRS}
    for stream in streams.values():
        next(stream)
    streams |= {name: ours(folder, views, batch_size, name == OURS[1]) for name in OURS}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in (*OURS, *THEIRS)}
    for _ in range(rounds):
        for name, runs in measured.items():
            take, count = streams[name].__next__, batches * (4 if name in OURS else 1)
            runs.append(tuple(value / count / batch_size for value in seconds(take, count)))
    rows = {
        name: {
            "images_per_s": 1 / statistics.median(wall for wall, _ in runs),
            "runs_images_per_s": [1 / wall for wall, _ in runs],
        }
        | {"cpu_ms_per_image": 1e3 * statistics.median(cpu for _, cpu in runs)}
        for name, runs in measured.items()
    }
    fastest = max(rows[name]["images_per_s"] for name in THEIRS)
    thriftiest = min(rows[name]["cpu_ms_per_image"] for name in THEIRS)
    for row in rows.values():
        row |= {"speed_ratio": row["images_per_s"] / fastest, "cpu_ratio": thriftiest / row["cpu_ms_per_image"]}
    return {"images": f"{len(encoded)} {folder.image_extension}", "batch_size": batch_size, "pipelines": rows}


def seconds(take: Callable[[], object], count: int) -> tuple[float, float]:
    """Wall and CPU seconds of `count` batches, with nothing else of ours running."""
    settle()
    for _ in range(WARM):
        take()
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        take()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def settle() -> None:
    """Wait until the other pipelines have filled their queues."""
    before = cpu_seconds()
    while True:
        time.sleep(0.25)
        now = cpu_seconds()
        if now - before < 0.03:
            return
        before = now


def cpu_seconds() -> float:
    """User and system time of this process and its workers."""
    me = psutil.Process()
    return sum(times.user + times.system for times in (process.cpu_times() for process in (me, *me.children(recursive=True))))


def ours(folder: ShardFolder, views: Sequence[ViewSpec], batch_size: int, grouped: bool):
    """Our loader."""
    from trainer.data.loader import Loader

    views = [replace(view, shared_by="group", groups=16) for view in views] if grouped else views
    options = {"threads": THREADS, "mean": Data.mean, "std": Data.std, "shuffle_buffer": 1024}
    return Loader(folder, views, batch_size=batch_size, seed=0, **options)


def theirs(encoded: list[bytes], views: Sequence[ViewSpec], batch_size: int, pil: bool) -> DataLoader:
    """The same work by torchvision."""
    transforms = [transform(view.of(copy), view.size) for view in views for copy in range(view.count)]
    images = Images(encoded, transforms, pil)
    workers = {"num_workers": THREADS, "persistent_workers": True, "drop_last": True}
    return DataLoader(images, batch_size, sampler=Endless(len(encoded)), **workers)


def transform(a: Augmentation, size: int) -> v2.Transform:
    """One view, in the order that SimCLR, DINO and CLeVER use; steps that are never taken are left out."""
    turn = [v2.RandomRotation(a.rotation, v2.InterpolationMode.BILINEAR)] if a.rotation else []
    bend = [v2.RandomApply([v2.ElasticTransform(a.elastic_alpha)], a.elastic)] if a.elastic else []
    solarize = [v2.RandomSolarize(128, a.solarize)] if a.solarize else []
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, a.crop_scale, a.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(a.flip),
            *turn,
            *bend,
            v2.RandomApply([v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)], a.jitter),
            v2.RandomGrayscale(a.grayscale),
            v2.RandomApply([v2.GaussianBlur(2 * (size // 20) + 1, a.blur_sigma)], a.blur),
            *solarize,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(Data.mean, Data.std),
        ]
    )


class Images(Dataset):
    """Encoded images in memory, and the views of each."""

    def __init__(self, encoded: list[bytes], transforms: Sequence[Callable], pil: bool) -> None:
        self.encoded, self.transforms, self.pil = encoded, transforms, pil

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        if self.pil:
            image = Image.open(io.BytesIO(self.encoded[i])).convert("RGB")
        else:
            buffer = torch.frombuffer(bytearray(self.encoded[i]), dtype=torch.uint8)
            image = decode_image(buffer, ImageReadMode.RGB)
        return tuple(transform(image) for transform in self.transforms)


class Endless(torch.utils.data.Sampler):
    """A random permutation after another."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):
        while True:
            yield from torch.randperm(self.size).tolist()


def read_images(folder: ShardFolder) -> list[bytes]:
    """Every encoded image of the split."""
    images = []
    for tar_path, index_path in zip(folder.tar_paths, folder.index_paths, strict=True):
        tar = Path(tar_path).read_bytes()
        places = [sample[folder.image_extension] for sample in read_index(Path(index_path))]
        images += [tar[offset : offset + size] for offset, size in places]
    return images


def as_table(rows: dict[str, dict], title: str) -> Table:
    """One case: ratios are to the better of torchvision's two."""
    table = Table(title=title)
    for column in ("pipeline", "images/s", "times as fast", "CPU ms per image", "times less CPU"):
        table.add_column(column, justify="left" if column == "pipeline" else "right")
    for name, row in rows.items():
        speed, cpu = f"{row['images_per_s']:.0f}", f"{row['cpu_ms_per_image']:.3f}"
        table.add_row(name, speed, f"{row['speed_ratio']:.1f}", cpu, f"{row['cpu_ratio']:.1f}")
    return table


def cifar10() -> Path:
    """Shards of 8,000 CIFAR-10 images, made once."""
    root = shared_data()
    unpack = [sys.executable, str(root / "unpack_cifar10.py"), str(root / "cifar10")]
    return shards("cifar10", lambda out: subprocess.run([*unpack, str(out)], check=True), limit=8000)


def imagenette() -> Path:
    """Shards of 2,000 images of Imagenette, shorter side 160, made once."""

    def unpack(out: Path) -> None:
        with tarfile.open(shared_data() / "imagenette160" / "train.tar") as tar:
            tar.extractall(out, filter="data")

    return shards("imagefolder", unpack, limit=2000)


def shards(source: str, unpack: Callable[[Path], object], limit: int) -> Path:
    """The folder of shards, made with data_prep if it is not there."""
    from data_prep.make_shards import make

    folder = Path("runs/benchmarks") / source
    if not (folder / "shards" / "train" / "manifest.json").exists():
        (folder / "images").mkdir(parents=True, exist_ok=True)
        unpack(folder / "images")
        make(source=source, root=str(folder / "images"), out=str(folder / "shards"), split="train", limit=limit)
    return folder / "shards"


def shared_data() -> Path:
    """Real images in a checkout that has them beside it."""
    folder = Path(os.environ.get("CARE_SHARED_DATA", "../shared/data"))
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", "real images", "Set CARE_SHARED_DATA, or give --shards32 and --shards160.")
    return folder


if __name__ == "__main__":
    exit_with_one_line(benchmark)

"""Images for the checks: drawn ones, CIFAR-10 from a folder, and shards of either."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.part import Skipped
from data_prep import synthetic
from data_prep.writer import ShardWriter
from trainer.data.shards import FORMAT, ShardFolder

PER_BATCH = 10_000  # images in a file of CIFAR-10


def drawn(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [count, size, size, 3] of eight shapes, and which shape."""
    numbers = np.arange(count)
    return np.concatenate(
        [synthetic.draw(0, 0, some, size)[0] for some in np.array_split(numbers, -(-count // 256))]
    ), numbers % 8


def cifar10(folder: Path | None, limit: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """ "train" and "test": images uint8 [N, 32, 32, 3] and labels int64 [N].

    Args:
        folder: official binary files, or tars of lossless WebP strips beside their labels; training files may be missing.
        limit: images of a split, at most.
    """
    files = sorted([*folder.rglob("*_batch*.bin"), *folder.rglob("*_batch*.tar")]) if folder else []
    splits = {
        "train": [f for f in files if f.stem.startswith("data_batch")],
        "test": [f for f in files if f.stem == "test_batch"],
    }
    if not all(splits.values()):
        raise Skipped(f"no CIFAR-10 in {folder}" if folder else "no CIFAR-10: --data DIR was not given")
    read = {}
    for split, paths in splits.items():
        parts = [_read(path) for path in paths[: -(-limit // PER_BATCH)]]
        images, labels = (np.concatenate([part[i] for part in parts])[:limit] for i in range(2))
        read[split] = images, labels.astype(np.int64)
    return read


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix == ".bin":
        raw = np.fromfile(path, np.uint8).reshape(-1, 3073)
        return raw[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), raw[:, 0]
    strips, label = [], np.empty(0, np.uint8)
    with tarfile.open(path) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            data = tar.extractfile(member).read()
            if member.name.endswith(".webp"):
                strips.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1, 32, 32, 3))
            else:
                label = np.frombuffer(data, np.uint8)
    return np.concatenate(strips), label


def shards(images: np.ndarray, label: np.ndarray, folder: Path, extension: str = "png") -> ShardFolder:
    """A finished train split of these images, written once."""
    split = folder / "train"
    if (split / "manifest.json").exists():
        return ShardFolder.open(split)
    split.mkdir(parents=True, exist_ok=True)
    written = []
    for first in range(0, len(images), 5000):
        writer = ShardWriter(split / f"train-{len(written):06d}.tar")
        for i, encoded in enumerate(_encoded(images[first : first + 5000], extension), first):
            writer.write(f"{i:09d}", {extension: encoded, "cls": b"%08d" % label[i], "index": b"%08d" % i})
        written.append(writer.close())
    shape = list(images.shape[1:3])
    manifest = {"format": FORMAT, "source": "gpu_check", "split": "train", "seed": 0, "samples": len(images), "classes": None}
    manifest |= {"image_extension": extension, "image_size": shape, "image_shape": shape, "factors": None}
    (split / "manifest.json").write_text(json.dumps(manifest | {"shards": [vars(shard) for shard in written]}))
    return ShardFolder.open(split)


def _encoded(images: np.ndarray, extension: str) -> Iterator[bytes]:
    options = {"png": {"format": "PNG"}, "jpg": {"format": "JPEG", "quality": 90}}[extension]
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, **options)
        yield file.getvalue()


def on(device: torch.device, images: np.ndarray, label: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, 3, H, W] on the device, and labels."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device), torch.from_numpy(label)

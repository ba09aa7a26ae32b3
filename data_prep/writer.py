"""Writes shards: deterministic USTAR tars with their DALI index, staged and published whole.

A split is staged in OUT/.SPLIT.partial. A tar, its index and its record there are written under a temporary name, synced and
renamed; a record is the proof that its tar is complete. When all splits are staged, each folder is renamed to OUT/SPLIT.
"""

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.source import Bad, Images, Sample, Source
from trainer.data.shards import FORMAT, Shard

BLOCK = tarfile.BLOCKSIZE
BLANK = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # mode 644, owner 0, time 0


class ShardWriter:
    """Writes one tar and its DALI v1.2 index; the bytes depend on the samples alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tar = path.with_suffix(".tar.tmp").open("wb")
        self._digest = hashlib.sha256()
        self._offset = 0
        self._lines: list[str] = []

    def write(self, key: str, components: dict[str, bytes]) -> None:
        """Append a sample: one file KEY.EXTENSION for each component, in the given order."""
        words = []
        for extension, data in components.items():
            name = f"{key}.{extension}"
            self._append(_header(name.encode(), len(data)))
            words.append(f"{extension} {self._offset} {len(data)} {name}")
            self._append(data + bytes(-len(data) % BLOCK))
        self._lines.append(" ".join(words))

    def close(self) -> Shard:
        """End the tar and give both files their final names."""
        self._append(bytes(2 * BLOCK))
        self._append(bytes(-self._offset % tarfile.RECORDSIZE))
        with self._tar:
            _sync(self._tar)
        os.replace(self._tar.name, self._path)
        write_atomically(self._path.with_suffix(".idx"), "\n".join([f"v1.2 {len(self._lines)}", *self._lines, ""]))
        return Shard(self._path.name, len(self._lines), self._offset, self._digest.hexdigest())

    def abandon(self) -> None:
        """Leave nothing."""
        self._tar.close()
        os.unlink(self._tar.name)

    def _append(self, data: bytes) -> None:
        self._tar.write(data)
        self._digest.update(data)
        self._offset += len(data)


def _header(name: bytes, size: int) -> bytes:
    """A USTAR header; tarfile's own takes eight times as long, half of the time of a small image."""
    block = bytearray(BLANK)
    block[: len(name)] = name
    block[124:136] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Under a temporary name, synced, renamed."""
    with path.with_name(f"{path.name}.tmp").open("w") as file:
        file.write(text)
        _sync(file)
    os.replace(file.name, path)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Split:
    """What is to be written into one folder.

    Args:
        name: "train", "val" or "test".
        source: where the images come from, with their classes and factors.
        images: the pool of the source that holds them.
        numbers: which of the pool, in the order of writing, int [n].
        plan: every setting that the bytes depend on: what two runs must have in common for one to continue the other.
    """

    name: str
    source: Source
    images: Images
    numbers: np.ndarray
    plan: dict[str, Any]

    @property
    def shards(self) -> int:
        """How many shards it makes."""
        return -(-len(self.numbers) // self.plan["shard_size"])

    def shard(self, number: int) -> np.ndarray:
        """The numbers of one shard."""
        return self.numbers[number * self.plan["shard_size"] :][: self.plan["shard_size"]]


@dataclass(frozen=True)
class Report:
    """What a job found: the shard with the range of its shorter sides and its images' one shape, or the bad images."""

    split: str
    images: int
    shard: Shard | None = None
    image_size: list[int] = field(default_factory=list)
    image_shape: list[int] | None = None
    bad: list[Bad] = field(default_factory=list)


def staging(out: Path, split: str) -> Path:
    """Where a split is written before it is published."""
    return out / f".{split}.partial"


def prepare_staging(out: Path, split: Split) -> None:
    """Keep what a run of the same plan left, without its temporary files; else start afresh."""
    folder = staging(out, split.name)
    file = folder / "plan.json"
    if not file.is_file() or json.loads(file.read_text()) != split.plan:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(file, json.dumps(split.plan))
    for stale in folder.glob("*.tmp"):
        stale.unlink()


def write_shard(out: Path, split: Split, number: int) -> Report:
    """Write shard `number` into the staging folder, or keep it if its record and checksum say that it is there."""
    path = staging(out, split.name) / f"{split.name}-{number:06d}.tar"
    record = path.with_suffix(".record")
    numbers = split.shard(number)
    if record.is_file():
        kept = json.loads(record.read_text())
        if file_sha256(path) == kept["shard"]["sha256"]:
            return Report(split.name, len(numbers), Shard(**kept["shard"]), kept["image_size"], kept.get("image_shape"))
    writer, bad, shapes = ShardWriter(path), [], []
    for index, sample in enumerate(split.images.read(numbers), number * split.plan["shard_size"]):
        if isinstance(sample, Bad):
            bad.append(sample)
        else:
            writer.write(f"{index:09d}", components(sample, index, split.source.image_extension))
            shapes.append(list(sample.shape))
    if bad:
        writer.abandon()
        return Report(split.name, len(numbers), bad=bad)
    shard, sides, image_shape = writer.close(), [min(shape) for shape in shapes], _common(shapes)
    image_size = [min(sides), max(sides)]
    write_atomically(record, json.dumps({"shard": asdict(shard), "image_size": image_size, "image_shape": image_shape}))
    return Report(split.name, len(numbers), shard, image_size, image_shape)


def find_bad(split: Split, number: int) -> Report:
    """Read the images of shard `number` and write nothing."""
    numbers = split.shard(number)
    return Report(split.name, len(numbers), bad=[sample for sample in split.images.read(numbers) if isinstance(sample, Bad)])


def components(sample: Sample, index: int, extension: str) -> dict[str, bytes]:
    """What a sample becomes in the tar. Numbers are fixed-width text: int() reads them, and DALI gets dense arrays."""
    parts = {extension: sample.image, "cls": b"%08d" % sample.label, "index": b"%08d" % index}
    return parts if sample.factors is None else parts | {"json": json.dumps(sample.factors).encode()}


def publish(out: Path, split: Split, reports: list[Report]) -> None:
    """Write the manifest and give the staged folder its final name, in the place of an old one."""
    folder, final, old = staging(out, split.name), out / split.name, out / f".{split.name}.old"
    write_atomically(folder / "manifest.json", json.dumps(_manifest(split, reports), indent=1) + "\n")
    for file in (*folder.glob("*.record"), folder / "plan.json"):
        file.unlink()
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    directory = os.open(out, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _manifest(split: Split, reports: list[Report]) -> dict[str, Any]:
    shards = sorted((asdict(r.shard) for r in reports if r.shard), key=lambda shard: shard["name"])
    return {
        "format": FORMAT,
        "source": split.plan["source"],
        "split": split.name,
        "seed": split.plan["seed"],
        "samples": sum(shard["samples"] for shard in shards),
        "classes": split.source.classes,
        "image_extension": split.source.image_extension,
        "image_size": [min(r.image_size[0] for r in reports), max(r.image_size[1] for r in reports)],
        "image_shape": _common([r.image_shape for r in reports]),
        "factors": split.source.factors,
        "plan": split.plan,
        "shards": shards,
    }


def _common(shapes: Sequence[list[int] | None]) -> list[int] | None:
    """The one shape, None where they differ."""
    return shapes[0] if all(shape == shapes[0] for shape in shapes) else None

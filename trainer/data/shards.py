"""A finished folder of WebDataset shards, as data_prep/make_shards.py writes it: its manifest, its tars and their indices.

Opening it checks what is cheap (names, sizes, sample counts); `data_prep/check_shards.py` reads every byte. No torch here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trainer.errors import UserError

FORMAT = 1
REMAKE = "Make it: python data_prep/make_shards.py --source SOURCE --root DIR --out {} (it resumes what was interrupted)."


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many samples it holds, its size in bytes and its checksum (hexadecimal SHA-256)."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @property
    def index_name(self) -> str:
        """File name of the DALI index beside the tar."""
        return Path(self.name).with_suffix(".idx").name


@dataclass(frozen=True)
class ShardFolder:
    """One split.

    Args:
        path: the folder.
        split: "train", "val" or "test".
        samples: number of images.
        classes: name of each label, None without labels.
        image_extension: component of each sample that holds the image: "png", "jpg" or "webp".
        factors: names of the generative factors in each sample's `json`, None for real images.
        shards: the tars in order; their samples are numbered 0, 1, ... through all of them.
        image_shape: height and width of every image as decoded, None where they differ or the manifest does not say.
    """

    path: Path
    split: str
    samples: int
    classes: tuple[str, ...] | None
    image_extension: str
    factors: tuple[str, ...] | None
    shards: tuple[Shard, ...]
    image_shape: tuple[int, int] | None = None

    @classmethod
    def open(cls, path: str | Path) -> "ShardFolder":
        """Read the manifest and see that every file is there in its size.

        Raises:
            UserError: no such folder, an unfinished one, a file missing or of another size.
        """
        folder = cls.from_manifest(path)
        for shard in folder.shards:
            _check_sizes(folder.path, shard)
        return folder

    @classmethod
    def from_manifest(cls, path: str | Path) -> "ShardFolder":
        """Read the manifest alone.

        Raises:
            UserError: no such folder, or an unfinished one.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        shape = manifest.get("image_shape")
        return cls(
            path=path,
            split=manifest["split"],
            samples=manifest["samples"],
            classes=_names(manifest["classes"]),
            image_extension=manifest["image_extension"],
            factors=_names(manifest["factors"]),
            shards=tuple(Shard(**shard) for shard in manifest["shards"]),
            image_shape=None if shape is None else (shape[0], shape[1]),
        )

    @property
    def tar_paths(self) -> list[str]:
        """The tars, in order."""
        return [str(self.path / shard.name) for shard in self.shards]

    @property
    def index_paths(self) -> list[str]:
        """Their DALI indices, in the same order."""
        return [str(self.path / shard.index_name) for shard in self.shards]

    def factors_table(self) -> np.ndarray:
        """The generative factors of every image, float64 [samples, len(factors)]; row i is the image of index i.

        Raises:
            UserError: the images are real, their factors unknown.
        """
        if self.factors is None:
            raise UserError(f"{self.path} holds real images", "drawn ones (factors known)", "Use --source synthetic.")
        table = np.full((self.samples, len(self.factors)), np.nan)
        for tar_path, index_path in zip(self.tar_paths, self.index_paths, strict=True):
            with open(tar_path, "rb") as tar:
                for components in read_index(Path(index_path)):
                    row = int(_read(tar, components["index"]))
                    factors = json.loads(_read(tar, components["json"]))
                    table[row] = [factors[name] for name in self.factors]
        return table


def read_index(path: Path) -> list[dict[str, tuple[int, int]]]:
    """A DALI v1.2 index: for each sample, extension -> (offset in the tar, size), bytes.

    Raises:
        ValueError: it is not such an index.
    """
    head, *lines = path.read_text().splitlines()
    version, count = head.split()
    if version != "v1.2" or int(count) != len(lines):
        raise ValueError(f"{path.name} is not a v1.2 index of {len(lines)} samples")
    samples = []
    for line in lines:
        words = line.split(" ")  # extension, offset, size, name; and again for the next component
        samples.append({words[i]: (int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 4)})
    return samples


def _read(tar: BinaryIO, place: tuple[int, int]) -> bytes:
    offset, size = place
    tar.seek(offset)
    return tar.read(size)


def _names(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def _read_manifest(path: Path) -> dict:
    file = path / "manifest.json"
    remake = REMAKE.format(path.parent)
    if not path.is_dir():
        raise UserError(f"no folder {path}", "a split's folder of shards", remake)
    if not file.is_file():
        splits = sorted(child.parent.name for child in path.glob("*/manifest.json"))
        if splits:
            raise UserError(f"{path} holds {', '.join(splits)}", "the folder of one split", f"Use {path / splits[0]}.")
        content = "has tars but no manifest.json: unfinished" if any(path.glob("*.tar")) else "has no shards"
        raise UserError(f"{path} {content}", "a finished folder of shards", remake)
    try:
        manifest = json.loads(file.read_text())
        missing = {"split", "samples", "classes", "image_extension", "factors", "shards"} - set(manifest)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is not readable ({error})", "the JSON that make_shards wrote", remake) from error
    if manifest.get("format") != FORMAT or missing:
        raise UserError(f"{file} is of format {manifest.get('format')}", f"format {FORMAT}, complete", remake)
    return manifest


def _check_sizes(path: Path, shard: Shard) -> None:
    tar, index = path / shard.name, path / shard.index_name
    remake = f"Copy it again, or make it again: the make_shards.py command of {path.parent} with --overwrite."
    for file in (tar, index):
        if not file.is_file():
            raise UserError(f"{file} is missing", "every file that manifest.json lists", remake)
    size = tar.stat().st_size
    if size != shard.bytes:
        raise UserError(f"{tar} has {size} bytes", f"{shard.bytes}, as manifest.json says", remake)
    with index.open(errors="replace") as lines:
        head = lines.readline().strip()
    if head != f"v1.2 {shard.samples}":
        raise UserError(f"{index} begins with {head[:40]!r}", f"a v1.2 index of {shard.samples} samples", remake)

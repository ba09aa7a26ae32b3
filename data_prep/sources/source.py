"""What a source is: numbered images with labels, that are read as checked samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Options:
    """What the command line says about a source; see make_shards.py."""

    root: Path | None
    seed: int
    samples: int
    size: int
    download: bool = False
    manifest: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    unlabelled: bool = False


@dataclass(frozen=True)
class Sample:
    """A good image: encoded, with its label (-1: none), the height and width as it is decoded, and its factors if known."""

    image: bytes
    label: int
    shape: tuple[int, int]
    factors: dict[str, float] | None = None


@dataclass(frozen=True)
class Bad:
    """An image that cannot be used: which, and why."""

    number: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class Images(Protocol):
    """Images numbered from 0, with `labels` int64 [N], -1 where there is none.

    Ten million of them are a few arrays, never as many objects: they would fill the memory, of each forked worker anew.

    Attributes:
        blocks: where images lie in blocks that are read whole (row groups): the number after the last image of each, int [B].
    """

    labels: np.ndarray
    blocks: np.ndarray | None = None

    def read(self, numbers: np.ndarray) -> Iterator[Sample | Bad]:
        """Decode and check these images, in this order."""
        ...


@dataclass(frozen=True)
class Source:
    """What `open_source` finds.

    Args:
        train: the official training images.
        test: the official test images, None where there are none.
        classes: name of each label, None without labels.
        image_extension: what `read` gives: "png", "jpg" or "webp".
        fingerprint: tells this content from another, the same for every layout of the same content.
        factors: names of the known factors.
        val: the official validation images; None to carve them out of `train`.
    """

    train: Images
    test: Images | None
    classes: list[str] | None
    image_extension: str
    fingerprint: str
    factors: list[str] | None = None
    val: Images | None = None

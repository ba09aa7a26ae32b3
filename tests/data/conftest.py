"""Shards of given images, for the data path's tests."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.shards import ShardFolder


@pytest.fixture
def shards_of(tmp_path: Path) -> Callable[..., ShardFolder]:
    """Write images (uint8 [H, W, 3]) as PNG into shards; image i has index i and label i mod 10 - 1."""
    from data_prep.writer import ShardWriter

    def write(images: Sequence[np.ndarray], shard_size: int = 1000, name: str = "train") -> ShardFolder:
        folder, shards = tmp_path / name, []
        folder.mkdir()
        for first in range(0, len(images), shard_size):
            writer = ShardWriter(folder / f"train-{len(shards):06d}.tar")
            for i, image in enumerate(images[first : first + shard_size], first):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                writer.write(f"{i:09d}", {"png": png.getvalue(), "cls": b"%08d" % (i % 10 - 1), "index": b"%08d" % i})
            shards.append(writer.close())
        shapes = {image.shape[:2] for image in images}
        shape = shapes.pop() if len(shapes) == 1 else None
        return ShardFolder(folder, "train", len(images), None, "png", None, tuple(shards), shape)

    return write


@pytest.fixture
def numbered(shards_of: Callable[..., ShardFolder]) -> Callable[..., ShardFolder]:
    """`samples` tiny images, told apart by their index alone."""

    def write(samples: int, shards: int = 1, name: str = "train") -> ShardFolder:
        return shards_of([np.zeros((8, 8, 3), np.uint8)] * samples, -(-samples // shards), name)

    return write

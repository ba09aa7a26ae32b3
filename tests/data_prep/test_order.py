"""The order of images: as it always was, mixed where blocks are read whole, and small for any number of images."""

import hashlib
import tracemalloc
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest

from data_prep.order import WINDOW, by_blocks, choose
from data_prep.processes import run
from data_prep.sources import open_source
from data_prep.sources.names import Names
from data_prep.sources.source import Images, Options, Sample, Source
from data_prep.writer import find_bad


class Tiny(Images):
    """Images of three bytes."""

    def __init__(self, labels: np.ndarray, blocks: np.ndarray | None = None) -> None:
        self.labels, self.blocks = labels, blocks

    def read(self, numbers: np.ndarray) -> Iterator[Sample]:
        yield from repeat(Sample(b"png", 0, (1, 1)), len(numbers))


def plan(**changes: object) -> dict:
    return {"seed": 5, "validation": 0.2, "limit": None, "shard_size": 100, "skip_bad": False} | changes


def test_equal_seeds_choose_what_the_first_release_chose() -> None:
    """Checksums of what its code gave; shards made with it are continued and compared by them."""
    labels = np.arange(1000) % 7 - 1
    source = Source(Tiny(labels), Tiny(labels[:100]), None, "png", "")
    found = {name: choose(source, name, plan(limit=650)).numbers for name in ("train", "val", "test")}
    assert {name: hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16] for name, numbers in found.items()} == {
        "train": "bc19217e24b3b92e",
        "val": "d4bdf399ccc37aec",
        "test": "9a553a90ee3611c2",
    }


def test_a_folder_has_the_fingerprint_of_the_first_release(tmp_path: Path) -> None:
    for name in ("train/b/2.jpg", "train/a/1.jpg", "train/a/x/0.png", "train/0.jpg", "val/a/9.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    found = open_source("imagefolder", Options(tmp_path, 0, 0, 0)).fingerprint
    assert found == "93cb35e837b96665a28ce6dfc88a117e3983aa7f5214415d6360ae4458dce3c3"


def test_images_in_blocks_are_chosen_alike_and_mixed_within_windows_of_whole_blocks() -> None:
    """Row groups of one class each, as a data set sorted by class has them."""
    n, rows = 40_000, 100
    labels = np.arange(n) // rows
    flat, blocked = (Source(Tiny(labels, b), None, None, "png", "") for b in (None, np.arange(rows, n + 1, rows)))
    for name in ("train", "val"):
        numbers = choose(blocked, name, plan(shard_size=500)).numbers
        assert sorted(numbers) == sorted(choose(flat, name, plan(shard_size=500)).numbers)
    split = choose(blocked, "train", plan(shard_size=500))
    for number in range(split.shards - 1):
        read = np.unique(labels[split.shard(number)])  # 500 images of 8 x 500 from blocks of which val took a fifth
        assert 45 <= len(read) <= 55
        assert np.abs(np.diff(read)).max() > 1
    images = labels[split.shard(0)]
    assert np.mean(images[1:] == images[:-1]) < 0.06  # neighbours are of one block as often as by chance, 1 in 50


def test_a_few_blocks_are_shuffled_altogether() -> None:
    order, blocks = np.random.default_rng(0).permutation(700), np.array([10, 10, 300, 700])
    assert (by_blocks(order, blocks, 800, np.random.default_rng(1)) == order).all()
    assert WINDOW * 100 == 800


@pytest.mark.parametrize("blocks", [None, np.arange(100, 1_000_001, 100)], ids=["files", "row groups"])
def test_a_million_images_are_planned_and_read_within_64_bytes_each(blocks: np.ndarray | None) -> None:
    """Eight numpy arrays; a million Python objects would be more, and each worker would copy them."""
    n, settings = 1_000_000, plan(shard_size=1000, validation=0.1)
    source = Source(Tiny(np.zeros(n, np.int64), blocks), None, ["one"], "png", "")
    tracemalloc.start()
    splits = [choose(source, name, settings) for name in ("train", "val", "test")]
    held, peak = tracemalloc.get_traced_memory()
    assert [len(split.numbers) for split in splits] == [900_000, 100_000, 0]
    assert held < 17 * n
    assert peak < 64 * n
    tracemalloc.reset_peak()
    jobs = [(split, number) for split in splits for number in range(split.shards)]
    reports = run("reading", 1, find_bad, jobs, [1000] * len(jobs))
    grown = tracemalloc.get_traced_memory()[1] - held
    tracemalloc.stop()
    assert sum(report.images for report in reports) == n
    assert grown < 2e6  # reports of 1,000 shards


def test_paths_take_their_characters_and_a_few_bytes() -> None:
    tracemalloc.start()
    names = Names()
    for number in range(200_000):
        names.append(f"train/n{number % 1000:08d}/{number:012d}.JPEG")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (len(names), names[0], names[199_999]) == (200_000, "train/n00000000/000000000000.JPEG", names[199_999])
    assert names[199_999] == "train/n00000999/000000199999.JPEG"
    assert held < (33 + 14) * len(names)
    names.append("\udcff'é")
    assert names[200_000] == "\udcff'é"

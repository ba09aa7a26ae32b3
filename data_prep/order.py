"""Which images go into a split, and in which order: a few arrays of numbers, however many images there are."""

from typing import Any

import numpy as np

from data_prep.sources.source import Source
from data_prep.writer import Split

POOLS = ("train", "test", "val")  # each with a random stream of its own
WINDOW = 8  # shards that share their row groups: each row group is read so often, and each shard mixes so many


def choose(source: Source, name: str, plan: dict[str, Any]) -> Split:
    """The images of a split in their shuffled order.

    Unless the source has images for val, val is a share of the labelled training images (of all, where none is labelled), and
    train is the rest.
    """
    pool = "train" if name == "val" and source.val is None else name
    images = getattr(source, pool)
    if images is None:
        return Split(name, source, source.train, np.empty(0, np.int64), plan)
    stream = np.random.Generator(np.random.Philox(key=[plan["seed"], POOLS.index(pool)]))
    order = stream.permutation(len(images.labels))
    if pool == "train" and source.val is None:
        labelled = order[images.labels[order] >= 0]
        candidates = labelled if len(labelled) else order
        val = candidates[: round(plan["validation"] * len(candidates))]
        in_val = np.zeros(len(order), bool)
        in_val[val] = True
        order = val if name == "val" else order[~in_val[order]]
    order = order[: plan["limit"]]
    if images.blocks is not None:
        order = by_blocks(order, images.blocks, WINDOW * plan["shard_size"], stream)
    return Split(name, source, images, order, plan | {"split": name})


def by_blocks(order: np.ndarray, blocks: np.ndarray, window: int, stream: np.random.Generator) -> np.ndarray:
    """The same images in an order that reads few blocks for each shard.

    The blocks are shuffled, and so are the images of every `window` that follow one another in that order of blocks; fewer
    images than that are shuffled altogether.

    Args:
        order: images in random order, int [n].
        blocks: the number after the last image of each block, [B].
        window: images that are shuffled together.
        stream: of the order of the blocks.
    """
    rank = stream.permutation(len(blocks)).astype(np.int32)
    gathered = np.argsort(rank[np.searchsorted(blocks, order, side="right")], kind="stable")
    for begin in range(0, len(order), window):
        gathered[begin : begin + window].sort()  # to the order that the images had
    return order[gathered]

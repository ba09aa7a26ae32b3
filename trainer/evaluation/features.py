"""Features of a split: what the frozen encoder makes of every image, over all ranks, in the order of the split."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.data.views import Batch
from trainer.objectives.objective import Objective


@dataclass(frozen=True)
class Features:
    """Features of N images, sorted by index, each image once; on the CPU.

    Shape:
        values[name]: float32 [count, N, D], one row of features for each of the `count` views called `name`.
        label: int64 [N], -1 where the image has none.
        index: int64 [N], position of the image in its split.
    """

    values: dict[str, Tensor]
    label: Tensor
    index: Tensor


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, BatchNorm statistics untouched; every submodule's own mode comes back after."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in modes:
            part.training = training


def extract(objective: Objective, batches: Iterable[Batch], part: str = "full", limit: int | None = None) -> Features:
    """Encode every view of every image.

    Args:
        objective: on the device where the batches are; its mode is restored.
        batches: one pass over a split, or over this rank's part of it; then every rank calls and gets the whole.
        part: "embedding" for the unit-norm vectors that the objective shapes, else a part of `represent`: "full"
            for the backbone's features.
        limit: stop after this many images on each rank.

    Returns: the features, float32 whatever the precision of training was.
    """
    views: dict[str, list[Tensor]] = {}
    labels, indices, left = [], [], sys.maxsize if limit is None else limit
    with frozen(objective):
        for batch in batches:
            for name, images in batch.views.items():
                encoded = [_encode(objective, view[:left], part).float().cpu() for view in images]
                views.setdefault(name, []).append(torch.stack(encoded, dim=1))
            labels.append(batch.label[:left].cpu())
            indices.append(batch.index[:left].cpu())
            left -= len(indices[-1])
            if left == 0:
                break
    index, order = np.unique(gather(torch.cat(indices)).numpy(), return_index=True)
    values = {name: gather(torch.cat(rows))[order].transpose(0, 1).contiguous() for name, rows in views.items()}
    return Features(values, gather(torch.cat(labels))[order], torch.from_numpy(index))


def gather(rows: Tensor) -> Tensor:
    """Rows of all ranks in the order of ranks, [sum N_r, ...]; ranks may hold different numbers. On the CPU, over gloo."""
    if not dist.is_initialized():
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)]))
    padded = torch.zeros(int(max(sizes)), *rows.shape[1:], dtype=rows.dtype)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def _encode(objective: Objective, images: Tensor, part: str) -> Tensor:
    return objective.embed(images) if part == "embedding" else objective.represent(images)[part]

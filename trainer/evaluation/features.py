"""Features of a split: what the frozen encoder makes of every image, over all ranks, in the order of the split."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.data.views import Batch
from trainer.errors import UserError
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


def extract(objective: Objective, batches: Iterable[Batch], parts: Sequence[str] = ("full",)) -> dict[str, Features]:
    """Encode every view of every image, once for all parts.

    Args:
        objective: on the device where the batches are; its mode is restored.
        batches: one pass over a split, or over this rank's part of it; then every rank calls and gets the whole.
        parts: "embedding" for the unit-norm vectors that the objective shapes, else parts of `represent`: "full"
            for the backbone's features.

    Returns: the features of every part, float32 whatever the precision of training was.

    Raises:
        UserError: the objective has no such part.
    """
    chunks: dict[str, list[Features]] = {part: [] for part in parts}
    with frozen(objective):
        for batch in batches:
            encoded = {name: [_encode(objective, view, parts) for view in images] for name, images in batch.views.items()}
            for part, chunk in chunks.items():
                values = {name: torch.stack([view[part] for view in views]) for name, views in encoded.items()}
                chunk.append(Features(values, batch.label.cpu(), batch.index.cpu()))
    return {part: _joined(_of_all_ranks(chunk)) for part, chunk in chunks.items()}


def _joined(chunks: list[Features]) -> Features:
    """One row for every image, in the order of the split."""
    index, order = np.unique(torch.cat([chunk.index for chunk in chunks]).numpy(), return_index=True)
    values = {name: torch.cat([chunk.values[name] for chunk in chunks], dim=1)[:, order] for name in chunks[0].values}
    return Features(values, torch.cat([chunk.label for chunk in chunks])[order], torch.from_numpy(index))


def _of_all_ranks(chunks: list[Features]) -> list[Features]:
    """The chunks of every rank; a rank may have more than another, or none."""
    if not dist.is_initialized():
        return chunks
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, chunks)
    return [chunk for rank in ranks for chunk in rank]


def _encode(objective: Objective, images: Tensor, parts: Sequence[str]) -> dict[str, Tensor]:
    """Float32 features [N, D] on the CPU by part."""
    found = {"embedding": objective.embed(images)} if "embedding" in parts else {}
    if set(parts) - {"embedding"}:
        found |= objective.represent(images)
    for part in parts:
        if part not in found:
            raise UserError(f"no part {part!r} of the representation", f"one of {', '.join(found)}", "Choose one of them.")
    return {part: found[part].float().cpu() for part in parts}

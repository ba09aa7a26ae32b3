"""Contrastive losses of embeddings that are already gathered from all ranks."""

import torch
from torch import Tensor
from torch.nn import functional as F


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, rows: slice = slice(None)) -> Tensor:
    """Normalised-temperature cross-entropy over 2N views (Chen et al. 2020, eq. 1).

    Every view is classified among the 2N - 1 others; the right answer is the other view of its image. The mean over
    disjoint `rows` that cover the batch is the loss of the batch, so that each rank computes its own rows only.

    Args:
        z1, z2: unit-norm embeddings of two views, [N, d]; row i of both is the same image.
        temperature: positive scalar.
        rows: the images whose two views are classified.

    Returns: mean loss, scalar of the type of `z1`.
    """
    everyone = torch.cat([z1, z2])
    image = torch.arange(len(z1), device=z1.device)
    view = torch.cat([image[rows], image[rows] + len(z1)])
    other = torch.cat([image[rows] + len(z1), image[rows]])
    logits = everyone[view] @ everyone.T / temperature
    itself = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, view[:, None], True)
    return F.cross_entropy(logits.masked_fill(itself, float("-inf")), other)

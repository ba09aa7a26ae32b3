"""The Gram term of CARE: rotations preserve inner products, so equivariance is equality of Gram matrices."""

import torch
from torch import Tensor


def gram_equivariance(z1: Tensor, z2: Tensor, groups: int) -> Tensor:
    """Mean squared difference of the inner products before and after a shared transformation (CARE, sec. 3, L_equi).

    Within a group all rows of `z1` saw one augmentation a and all rows of `z2` another, a'. The loss is zero exactly
    when one orthogonal map per group carries z1 to z2. The mean is over ordered pairs of different images.

    Args:
        z1, z2: unit-norm embeddings, [B, d]; B divisible by `groups`, group g in consecutive rows.
        groups: number of groups, each with at least 2 images.

    Returns: scalar of the type of `z1`.
    """
    z1, z2 = (z.unflatten(0, (groups, -1)) for z in (z1, z2))
    # K1 - K2 = sym(D S^T) with D = z1 - z2, S = z1 + z2: one product, and no cancellation of nearly equal numbers.
    cross = (z1 - z2) @ (z1 + z2).mT
    difference = (cross + cross.mT) / 2
    images = z1.shape[1]
    off_diagonal = 1 - torch.eye(images, dtype=z1.dtype, device=z1.device)
    return (difference * off_diagonal).square().sum((1, 2)).mean() / (images * (images - 1))

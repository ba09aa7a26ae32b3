"""The Gram term of CARE: rotations preserve inner products, so equivariance is equality of Gram matrices."""

import torch
from torch import Tensor

from trainer.ops.autograd import differentiate_once

LARGEST = 64  # images a group of the kernel: the Gram matrix of more spills a program's registers


def gram_equivariance(z1: Tensor, z2: Tensor, groups: int) -> Tensor:
    """Mean squared difference of the inner products before and after a shared transformation (CARE, sec. 3, L_equi).

    Within a group all rows of `z1` saw one augmentation a and all rows of `z2` another, a'. The loss is zero exactly
    when one orthogonal map per group carries z1 to z2. The mean is over ordered pairs of different images.
    Differentiable once.

    Args:
        z1, z2: unit-norm embeddings, [B, d]; B divisible by `groups`, group g in consecutive rows. Half types count in float32.
        groups: number of groups, each with at least 2 images.

    Returns: scalar float32; float64 of float64 embeddings.

    Raises:
        ValueError: groups of different sizes or of single images.
    """
    if len(z1) % groups or len(z1) < 2 * groups:
        raise ValueError(f"{len(z1)} images cannot be {groups} groups of one size, two or more images in each")
    z = torch.stack([z1, z2]).unflatten(1, (groups, -1))
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return _gram_equivariance(z, torch.is_grad_enabled() and z.requires_grad)[0]


@torch.library.custom_op("care::gram_equivariance", mutates_args=())
def _gram_equivariance(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss of z [2, G, n, d] and its gradient if wanted: the difference of the Gram matrices is at hand only now."""
    if z.is_cuda and z.dtype == torch.float32 and z.shape[2] <= LARGEST:
        from trainer.ops.kernels.gram import gram_equivariance_fused  # Triton comes with torch for GPUs only

        return gram_equivariance_fused(z, gradient)
    return gram_equivariance_batched(z, gradient)


@_gram_equivariance.register_fake
def _(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(()), z.new_empty(z.shape if gradient else 0)


differentiate_once(_gram_equivariance, value=0, gradients=[1])


def gram_equivariance_batched(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """The Gram term by batched products; any device.

    K1 - K2 = sym(D S^T) with D = z1 - z2, S = z1 + z2: one product, and no cancellation of nearly equal numbers. (The
    d x d form, sum over tr(D^T D S^T S) + tr((S^T D)^2), is cheaper for n > 1.5 d, but its two terms cancel where the loss is
    small.) The gradients are 4 (K1 - K2) z1 and -4 (K1 - K2) z2, over the number of pairs.
    """
    z1, z2 = z
    cross = torch.bmm(z1 - z2, (z1 + z2).mT)
    difference = (cross + cross.mT) / 2
    difference.diagonal(dim1=1, dim2=2).zero_()
    pairs = len(z1) * z1.shape[1] * (z1.shape[1] - 1)
    loss = difference.square().sum() / pairs
    if not gradient:
        return loss, z.new_empty(0)
    difference *= 4 / pairs
    return loss, torch.stack([torch.bmm(difference, z1), torch.bmm(difference, z2).neg_()])

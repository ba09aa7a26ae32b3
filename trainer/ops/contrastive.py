"""Contrastive losses of embeddings that are already gathered from all ranks."""

import torch
from torch import Tensor

from trainer.ops.autograd import differentiate_once

CHUNK = 2**20  # logits at a time where there is no kernel: 4 MiB stay in a CPU's cache, and products of them are efficient
MASKED = -1e30  # logit of an image with itself: its exponential is 0, but unlike infinity it can be subtracted from itself


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, rows: slice = slice(None)) -> Tensor:
    """Normalised-temperature cross-entropy over 2N views (Chen et al. 2020, eq. 1), in memory linear in N.

    Every view is classified among the 2N - 1 others; the right answer is the other view of its image. The mean over
    disjoint `rows` that cover the batch is the loss of the batch, so that each rank computes its own rows only. Its
    gradient reaches all rows, and averages to the batch's like the loss itself. Differentiable once.

    Args:
        z1, z2: unit-norm embeddings of two views, [N, d]; row i of both is the same image. Half types count in float32.
        temperature: positive scalar.
        rows: the consecutive images whose two views are classified.

    Returns: mean loss, scalar float32; float64 of float64 embeddings.
    """
    z = torch.stack([z1, z2])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    classified = range(len(z1))[rows]
    return _nt_xent(z, temperature, classified.start, classified.stop, torch.is_grad_enabled() and z.requires_grad)[0]


@torch.library.custom_op("care::nt_xent", mutates_args=())
def _nt_xent(z: Tensor, temperature: float, start: int, stop: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss of the images from start to stop in z [2, N, d], and its gradient if wanted: the softmax is at hand only now."""
    if z.is_cuda and z.dtype == torch.float32:
        from trainer.ops.kernels.contrastive import nt_xent_fused  # Triton comes with torch for GPUs only

        return nt_xent_fused(z, temperature, start, stop, gradient)
    return nt_xent_chunked(z, temperature, start, stop, gradient)


@_nt_xent.register_fake
def _(z: Tensor, temperature: float, start: int, stop: int, gradient: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(()), z.new_empty(z.shape if gradient else 0)


differentiate_once(_nt_xent, value=0, gradients=[1])


def nt_xent_chunked(z: Tensor, temperature: float, start: int, stop: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """NT-Xent of as many images at a time as CHUNK logits serve; any device.

    The loss of a view is log(1 + e^x), x = (log-sum-exp over the views of other images) - (logit of the other view): nothing
    cancels however small it is. With w_j the softmax over the other images, its gradient by the logits is sigmoid(x) times
    w_j, and -sigmoid(x) at the other view.
    """
    everyone, images, views = z.flatten(0, 1), z.shape[1], 2 * (stop - start)
    loss, slope = z.new_zeros(()), z.new_zeros(z.shape if gradient else 0)
    step = max(1, CHUNK // (4 * images))
    for first in range(start, stop, step):
        own = slice(first, min(first + step, stop))
        view, partner = z[:, own].flatten(0, 1), z[:, own].flip(0).flatten(0, 1)
        logits = (view / temperature) @ everyone.T
        logits.view(2, -1, 2, images)[..., own].diagonal(dim1=1, dim2=3).fill_(MASKED)
        top = logits.amax(1, keepdim=True)
        weights = logits.sub_(top).exp_()
        mass = weights.sum(1, keepdim=True)
        x = top + mass.log() - (view * partner).sum(1, keepdim=True) / temperature
        loss += torch.logaddexp(x, x.new_zeros(())).sum() / views
        if gradient:
            wrong = x.sigmoid() / (temperature * views)
            pull = weights @ everyone * (wrong / mass)
            push = partner * (wrong + wrong.view(2, -1, 1).flip(0).flatten(0, 1))
            slope[:, own] += (pull - push).view(2, -1, z.shape[2])
            slope.flatten(0, 1).addmm_(weights.T, view * (wrong / mass))
    return loss, slope

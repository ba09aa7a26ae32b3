"""The orthogonal polar factor by matrix products alone: what a GPU does fast and an SVD does slowly."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BOOST = (2.43260, -2.13260)
TAIL = ((2.72344, -1.95931), (1.54927, -0.50702), (1.50157, -0.50022), (1.5, -0.5), (1.5, -0.5))


def schedule(resolution: float) -> list[tuple[float, float]]:
    """Coefficients (a, b) of the steps X <- a X + b (X X^T) X.

    Every boost lifts small singular values 2.4-fold and keeps the large ones clear of divergence (the cushion that plain
    Polar Express lacks, which gives nan on collapsed data); the tail brings to 1 all that are above `resolution`, relative
    to the norm.
    """
    return [BOOST] * math.floor(math.log(1 / resolution) / math.log(BOOST[0])) + list(TAIL)


class Polar(NamedTuple):
    """The factor of every matrix and how far it can be trusted.

    Args:
        factor: X [G, n, m]; X X^T = 1 on the directions that converged.
        missing: number of directions that did not, sum_i (1 - x_i^2) over the singular values x_i of X beyond rounding, [G].
    """

    factor: Tensor
    missing: Tensor


def polar(matrix: Tensor, resolution: float) -> Polar:
    """The factor U V^T of M = U S V^T; vanishing singular values stay at 0.

    Args:
        matrix: M [G, n, m], n <= m; of any scale, zero included.
        resolution: smallest singular value that is brought to 1, relative to the norm.
    """
    gram = matrix @ matrix.mT
    # ||M M^T||^(1/2) bounds the largest singular value; the margin is for its rounding.
    norm = 1.0001 * gram.square().sum((1, 2)).sqrt().sqrt()
    x = matrix / norm.clamp_min(1e-30)[:, None, None]
    for a, b in schedule(resolution):
        x = torch.baddbmm(x, x @ x.mT, x, beta=a, alpha=b)
    directions = matrix.shape[1] * (1 - torch.finfo(matrix.dtype).eps)
    return Polar(x, (directions - x.square().sum((1, 2))).clamp_min(0))

"""NT-Xent against its formula written as loops."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from trainer.ops.contrastive import nt_xent


def formula(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> float:
    """Chen et al. 2020, eq. 1, averaged over both orders of every positive pair."""
    z, n = torch.cat([z1, z2]), len(z1)
    total = 0.0
    for i in range(2 * n):
        similar = {k: math.exp(float(z[i] @ z[k]) / temperature) for k in range(2 * n) if k != i}
        total -= math.log(similar[(i + n) % (2 * n)] / sum(similar.values()))
    return total / (2 * n)


@pytest.mark.parametrize(("n", "d", "temperature"), [(1, 4, 0.5), (2, 3, 0.1), (17, 8, 0.2), (40, 128, 0.5)])
def test_follows_the_formula(n, d, temperature):
    torch.manual_seed(0)
    z1, z2 = normalize(torch.randn(2, n, d, dtype=torch.float64), dim=2)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(formula(z1, z2, temperature), rel=1e-12, abs=1e-12)
    z1.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, z2, temperature), (z1,))


def test_the_rows_of_all_ranks_average_to_the_whole():
    z1, z2 = normalize(torch.randn(2, 12, 8, dtype=torch.float64), dim=2)
    parts = [nt_xent(z1, z2, 0.5, slice(start, start + 4)) for start in (0, 4, 8)]
    assert torch.stack(parts).mean().item() == pytest.approx(nt_xent(z1, z2, 0.5).item(), rel=1e-12)

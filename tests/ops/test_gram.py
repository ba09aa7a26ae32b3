"""The Gram term against its definition, and CARE's two claims about it (sec. 3 and appendix)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group
from torch.nn.functional import normalize

from trainer.ops.gram import gram_equivariance


def embeddings(n: int, d: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def definition(z1: torch.Tensor, z2: torch.Tensor, groups: int) -> float:
    """The mean over groups and ordered pairs, written out as loops."""
    size, total = len(z1) // groups, 0.0
    for g in range(groups):
        rows = range(g * size, (g + 1) * size)
        pairs = [(i, j) for i in rows for j in rows if i != j]
        total += sum(float(z1[i] @ z1[j] - z2[i] @ z2[j]) ** 2 for i, j in pairs) / len(pairs)
    return total / groups


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 4), size=st.integers(2, 9), d=st.integers(2, 20), seed=st.integers(0, 99))
def test_value_and_gradient_follow_the_definition(groups, size, d, seed):
    z1, z2 = embeddings(groups * size, d, seed).requires_grad_(), embeddings(groups * size, d, seed + 100).requires_grad_()
    loss = gram_equivariance(z1, z2, groups)
    assert loss.item() == pytest.approx(definition(z1.detach(), z2.detach(), groups), rel=1e-10)
    assert torch.autograd.gradcheck(lambda a, b: gram_equivariance(a, b, groups), (z1, z2))


def test_float32_loses_nothing_to_cancellation_where_views_nearly_agree():
    z1 = embeddings(64, 32, 0)
    z2 = normalize(z1 + 1e-4 * embeddings(64, 32, 1))
    assert gram_equivariance(z1.float(), z2.float(), 4).item() == pytest.approx(
        definition(z1.float().double(), z2.float().double(), 4), rel=1e-3
    )


def test_zero_exactly_when_every_group_is_turned_by_an_orthogonal_map_of_its_own():
    z1 = embeddings(40, 8, 0)
    turns = [torch.from_numpy(ortho_group.rvs(8, random_state=seed)) for seed in range(4)]
    z2 = torch.cat([rows @ turn for rows, turn in zip(z1.chunk(4), turns, strict=True)])
    assert gram_equivariance(z1, z2, 4) < 1e-28
    assert gram_equivariance(z1, z2, 1) > 1e-3  # no single map serves all groups


def test_zero_loss_implies_an_orthogonal_map():
    """Minimise the loss from a random start: the result must be related by an orthogonal map, found here by SVD."""
    z1, raw = embeddings(12, 4, 0), embeddings(12, 4, 1).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [raw], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = gram_equivariance(z1, normalize(raw), 1)
        loss.backward()
        return loss

    optimiser.step(closure)
    z2 = normalize(raw.detach())
    u, _, vh = np.linalg.svd((z1.T @ z2).numpy())
    assert closure() < 1e-16
    assert np.abs(z1.numpy() @ (u @ vh) - z2.numpy()).max() < 1e-6


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 3e-2])
def test_residual_of_the_best_rotation_obeys_the_papers_bound(noise):
    """sum_ij (<x_i,x_j> - <y_i,y_j>)^2 <= eps^4 implies residual <= (1 + sqrt 2) ||A^+|| eps^2 (CARE, appendix)."""
    x = embeddings(200, 8, 0)
    y = normalize(x @ torch.from_numpy(ortho_group.rvs(8, random_state=1)) + noise * embeddings(200, 8, 2))
    eps = float((x @ x.T - y @ y.T).square().sum()) ** 0.25
    inverse_norm = 1 / float(torch.linalg.svdvals(x)[-1])
    assert inverse_norm * eps <= 1 / np.sqrt(2)  # the condition of the theorem
    u, _, vh = torch.linalg.svd(x.T @ y)
    assert float((x @ (u @ vh) - y).norm()) <= (1 + np.sqrt(2)) * inverse_norm * eps**2

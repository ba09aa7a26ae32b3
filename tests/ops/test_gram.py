"""The Gram term against its definition, and CARE's two claims about it (sec. 3 and appendix)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group
from torch.nn.functional import normalize

from trainer.ops.gram import _gram_equivariance, gram_equivariance


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


def matrices(z: torch.Tensor, groups: int) -> torch.Tensor:
    k1, k2 = (torch.block_diag(*(rows @ rows.T for rows in view.chunk(groups))) for view in z)
    size = z.shape[1] // groups
    return (k1 - k2).fill_diagonal_(0).square().sum() / (groups * size * (size - 1))


def ours(z: torch.Tensor, groups: int) -> torch.Tensor:
    return gram_equivariance(z[0], z[1], groups)


def value_and_gradient(loss, z: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.clone().requires_grad_()
    value = loss(z, groups)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
def test_float32_loses_nothing_to_cancellation_where_views_nearly_agree(noise):
    z1 = embeddings(64, 32, 0)
    z = torch.stack([z1, normalize(z1 + noise * embeddings(64, 32, 1))]).float()
    found, slope = value_and_gradient(ours, z, 4)
    expected, expected_slope = value_and_gradient(matrices, z.double(), 4)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (slope - expected_slope).norm() < 1e-5 * expected_slope.norm()


def test_half_precision_is_computed_in_float32_and_autocast_changes_nothing():
    z = torch.stack([embeddings(20, 16, 0), embeddings(20, 16, 1)]).bfloat16()
    expected, slope = value_and_gradient(ours, z.float(), 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, found_slope = value_and_gradient(ours, z, 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(found_slope, slope.bfloat16())


@pytest.mark.parametrize("gradient", [True, False])
def test_is_a_proper_operator(gradient):
    z = embeddings(24, 5, 0).float().reshape(2, 3, 4, 5).requires_grad_(gradient)
    torch.library.opcheck(_gram_equivariance, (z, gradient))


def test_compiles_without_a_break_to_the_same_bits():
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    z = embeddings(24, 5, 0).reshape(2, 12, 5)
    for found, expected in zip(*(value_and_gradient(f, z, 3) for f in (compiled, ours)), strict=True):
        assert torch.equal(found, expected)


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


@pytest.mark.parametrize("groups", [6, 3])
def test_groups_of_single_images_or_of_different_sizes_are_refused(groups):
    z = embeddings(6 if groups == 6 else 7, 4, 0)
    with pytest.raises(ValueError, match=f"cannot be {groups} groups"):
        gram_equivariance(z, z, groups)

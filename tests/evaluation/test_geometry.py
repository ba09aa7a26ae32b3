"""The measures of geometry against scipy, scikit-learn, literal loops, and encoders whose geometry is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.transform import Rotation
from torch.nn.functional import normalize

from trainer.evaluation.geometry import (
    EPS,
    displacement,
    effective_rank,
    gamma,
    measure_motion,
    recovery,
    unexplained,
    wahba,
)


def cloud(n=60, d=5, seed=0):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def rotation(d=5, seed=0, proper=True):
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    if (torch.linalg.det(q) > 0) != proper:
        q[:, 0] *= -1
    return q


def noisy(seed, scale=0.3):
    source = cloud(seed=seed)
    return source, normalize(source @ rotation(seed=seed) + scale * cloud(seed=seed + 1000), dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_wahba_over_o_is_scipys_orthogonal_procrustes(seed):
    source, target = noisy(seed, scale=1.5)
    r, _ = orthogonal_procrustes(source.numpy(), target.numpy())
    expected = np.linalg.norm(source.numpy() @ r - target.numpy()) / math.sqrt(len(source))
    assert wahba(source, target, proper=False) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_wahba_over_so_is_scipys_align_vectors_in_three_dimensions(seed):
    source, target = cloud(d=3, seed=seed), cloud(d=3, seed=seed + 50)
    _, rssd = Rotation.align_vectors(target.numpy(), source.numpy())
    assert wahba(source, target, proper=True) == pytest.approx(rssd / math.sqrt(len(source)), rel=1e-9)


def test_a_reflection_is_explained_over_o_and_not_over_so():
    source = cloud()
    target = source @ rotation(proper=False)
    smallest = torch.linalg.svdvals(source)[-1].item() ** 2  # of the cross-covariance: singular values of F squared
    assert wahba(source, target, proper=False) < 1e-14
    assert wahba(source, target, proper=True) == pytest.approx(math.sqrt(4 * smallest / len(source)), rel=1e-9)


def test_without_full_rank_a_rotation_does_what_a_reflection_does():
    source = torch.cat([cloud(d=4), torch.zeros(60, 1, dtype=torch.float64)], dim=1)
    assert wahba(source, source @ rotation(proper=False), proper=True) < 1e-7


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0, 3), n=st.integers(2, 40), d=st.integers(1, 8))
def test_wahba_is_ordered_and_blind_to_rotations_of_the_space(seed, scale, n, d):
    source = cloud(n, d, seed)
    target = source @ rotation(d, seed) + scale * cloud(n, d, seed + 1)
    over_o, over_so = wahba(source, target, proper=False), wahba(source, target, proper=True)
    still = displacement(source, target)
    assert over_o <= over_so + 1e-12
    assert over_so <= still + 1e-12
    assert 0 <= unexplained(over_so, still) <= 1
    q = rotation(d, seed + 2)
    assert wahba(source @ q, target @ q, proper=True) == pytest.approx(over_so, abs=1e-7)


def test_an_equivariant_encoder_has_no_residual_and_a_large_displacement():
    source = cloud()
    targets = torch.stack([source @ rotation(seed=seed) for seed in range(4)])
    measures = measure_motion(source, targets)
    assert max(measures["wahba_so"] + measures["wahba_o"] + measures["gamma"]) < 1e-13
    assert min(measures["l_inv"]) > 0.5
    assert unexplained(measures["wahba_so"][0], measures["l_inv"][0]) < 1e-12


def test_an_invariant_encoder_gives_numbers_and_no_credit():
    source = cloud()
    measures = measure_motion(source, source[None])
    assert measures == {"wahba_so": [pytest.approx(0, abs=1e-14)], "wahba_o": [pytest.approx(0, abs=1e-14)], "l_inv": [0.0]} | {
        "gamma": [pytest.approx(0, abs=1e-14)],
        "angle_std": [pytest.approx(0, abs=1e-14)],
    }
    assert unexplained(measures["wahba_so"][0], 0.0) == 1.0


def test_gamma_is_the_literal_double_loop():
    source, target = (x.numpy() for x in noisy(3))
    terms = []
    for i, (x, y) in enumerate(zip(source, target, strict=True)):
        for j, (x2, y2) in enumerate(zip(source, target, strict=True)):
            if i != j:
                change = np.sum((y2 - y) ** 2) - np.sum((x2 - x) ** 2)
                terms.append(change**2 / ((np.sum((y2 - x2) ** 2) + np.sum((y - x) ** 2)) ** 2 + EPS))
    assert gamma(torch.from_numpy(source), torch.from_numpy(target)) == pytest.approx(np.mean(terms), rel=1e-10)


def test_gamma_does_not_depend_on_the_size_of_its_chunks(monkeypatch):
    source, target = noisy(4)
    whole = gamma(source, target)
    monkeypatch.setattr("trainer.evaluation.geometry.CHUNK", 7)
    assert gamma(source, target) == pytest.approx(whole, rel=1e-12)


def test_gamma_of_unrelated_embeddings_is_far_from_zero():
    assert gamma(cloud(seed=1), cloud(seed=2)) > 0.1


def test_effective_rank_of_known_spectra():
    points = cloud(64, 8)
    basis, _ = torch.linalg.qr(points - points.mean(dim=0))  # orthonormal columns, each of mean zero
    assert effective_rank(basis) == pytest.approx(8)
    assert effective_rank(basis[:, :3] + 7) == pytest.approx(3)
    two = basis[:, :2] * torch.tensor([3.0, 1.0])
    assert effective_rank(two) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert effective_rank((basis[:1] + 1).repeat(64, 1).float()) == 0
    assert math.isnan(effective_rank(basis * math.nan))


@pytest.mark.parametrize("columns", [1, 2])
def test_recovery_is_the_r2_of_scikit_learns_ridge(columns):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(300, 12)) * rng.uniform(0.1, 9, 12) + 3, rng.normal(size=(200, 12)) * 2 + 3
    w = rng.normal(size=(12, columns))
    y, t = x @ w + rng.normal(size=(300, columns)), z @ w + rng.normal(size=(200, columns))
    scaler = StandardScaler().fit(x)
    prediction = Ridge(alpha=1e-3 * 299).fit(scaler.transform(x), y).predict(scaler.transform(z)).reshape(t.shape)
    expected = r2_score(t, prediction, multioutput="variance_weighted")
    assert recovery(*map(torch.from_numpy, (x, y, z, t))) == pytest.approx(expected, abs=1e-5)


def test_a_factor_that_never_varies_is_not_recovered():
    x = cloud()
    assert recovery(x, torch.ones(60, 1), x, torch.ones(60, 1)) == 0

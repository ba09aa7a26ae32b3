"""NT-Xent against its formula written as loops and, gradients included, against the whole matrix of logits in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.ops import contrastive
from trainer.ops.contrastive import nt_xent


def views(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(2, n, d, dtype=torch.float64, generator=generator), dim=2).to(dtype)


def formula(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> float:
    """Chen et al. 2020, eq. 1, averaged over both orders of every positive pair."""
    z, n = torch.cat([z1, z2]), len(z1)
    total = 0.0
    for i in range(2 * n):
        similar = {k: math.exp(float(z[i] @ z[k]) / temperature) for k in range(2 * n) if k != i}
        total -= math.log(similar[(i + n) % (2 * n)] / sum(similar.values()))
    return total / (2 * n)


def whole_matrix(z: torch.Tensor, temperature: float, rows: slice = slice(None)) -> torch.Tensor:
    n = z.shape[1]
    logits = torch.cat([*z]) @ torch.cat([*z]).T / temperature
    losses = cross_entropy(logits.fill_diagonal_(-math.inf), (torch.arange(2 * n) + n) % (2 * n), reduction="none")
    return losses.view(2, n)[:, rows].mean()


def value_and_gradient(loss, z: torch.Tensor, *args) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.clone().requires_grad_()
    value = loss(z, *args)
    return value.detach(), torch.autograd.grad(value, z)[0]


def ours(z: torch.Tensor, *args) -> torch.Tensor:
    return nt_xent(z[0], z[1], *args)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize(("n", "d", "temperature"), [(1, 4, 0.5), (2, 3, 0.1), (17, 8, 0.2), (40, 128, 0.5), (6, 16, 0.01)])
def test_follows_the_formula(n, d, temperature):
    z1, z2 = views(n, d)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(formula(z1, z2, temperature), rel=1e-12, abs=1e-12)
    assert torch.autograd.gradcheck(ours, (torch.stack([z1, z2]).requires_grad_(), temperature), fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 40),
    d=st.integers(1, 40),
    temperature=st.sampled_from([0.001, 0.01, 0.1, 0.5, 10.0]),
    rows=st.tuples(st.integers(0, 39), st.integers(1, 40)),
    chunk=st.sampled_from([1, 300, 2**20]),
    seed=st.integers(0, 99),
)
def test_float32_has_the_loss_and_gradient_of_float64(n, d, temperature, rows, chunk, seed):
    start = rows[0] % n
    z, arguments = views(n, d, seed, torch.float32), (temperature, slice(start, min(n, start + rows[1])))
    expected, slope = value_and_gradient(whole_matrix, z.double(), *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "CHUNK", chunk)
        found, found_slope = value_and_gradient(ours, z, *arguments)
    rounding = max(1e-5, 1e-6 / temperature)  # of a logit, which is up to 1 / temperature
    assert abs(found.item() - expected.item()) <= rounding * max(expected.item(), 1e-3)
    assert float((found_slope - slope).norm()) <= rounding * max(float(slope.norm()), 1e-3)


def test_a_small_loss_is_as_exact_as_a_large_one():
    z = torch.eye(16).expand(2, -1, -1)  # 30 negatives of e^-20 each: 1 + that is 1 in float32
    expected, slope = value_and_gradient(whole_matrix, z.double(), 0.05)
    found, found_slope = value_and_gradient(ours, z, 0.05)
    assert expected < 1e-7
    assert found.item() == pytest.approx(30 * math.exp(-20), rel=1e-5)
    assert relative_error(found_slope, slope) < 1e-5


def test_one_image_has_no_negatives_and_no_loss():
    loss, slope = value_and_gradient(ours, views(1, 8, dtype=torch.float32), 0.01)
    assert loss == 0
    assert slope.abs().max() == 0


def test_identical_images_count_as_negatives_of_each_other():
    z = views(8, 16, dtype=torch.float32)[:, [0, 0, 1, 2, 3, 3, 3, 4]]
    for temperature in (0.5, 0.05):
        expected, slope = value_and_gradient(whole_matrix, z.double(), temperature)
        found, found_slope = value_and_gradient(ours, z, temperature)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert relative_error(found_slope, slope) < 1e-5


def test_the_rows_of_all_ranks_average_to_the_whole_and_their_gradients_too():
    z = views(12, 8)
    parts, slopes = zip(*(value_and_gradient(ours, z, 0.5, slice(start, start + 4)) for start in (0, 4, 8)), strict=True)
    expected, slope = value_and_gradient(ours, z, 0.5)
    assert torch.stack(parts).mean().item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(torch.stack(slopes).mean(0), slope) < 1e-12


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("images", [1024, 2048])
def test_no_tensor_holds_the_logits_of_the_whole_batch(images):
    z = views(images, 8, dtype=torch.float32)
    with LargestTensor() as largest:  # the operator's inside: from outside a mode sees one operation
        contrastive.nt_xent_chunked(z, 0.5, 0, images, True)
    assert 2 * images * 8 < largest.elements <= contrastive.CHUNK < (2 * images) ** 2


def test_half_precision_is_computed_in_float32_and_autocast_changes_nothing():
    z = views(20, 16, dtype=torch.bfloat16)
    expected, slope = value_and_gradient(ours, z.float(), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found, found_slope = value_and_gradient(ours, z, 0.1)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(found_slope, slope.bfloat16())


@pytest.mark.parametrize("gradient", [True, False])
def test_is_a_proper_operator(gradient):
    z = views(9, 5, dtype=torch.float32).requires_grad_(gradient)
    torch.library.opcheck(contrastive._nt_xent, (z, 0.3, 2, 7, gradient))


def test_compiles_without_a_break_to_the_same_bits():
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for z in (views(12, 8, dtype=torch.float32), views(12, 8, dtype=torch.float32).bfloat16()):
        for found, expected in zip(*(value_and_gradient(f, z, 0.3, slice(2, 9)) for f in (compiled, ours)), strict=True):
            assert torch.equal(found, expected)

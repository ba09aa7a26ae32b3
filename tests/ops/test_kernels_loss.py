"""The Triton kernels of the losses: interpreted, against float64; compiled for sm_90, within its registers and memory."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from kernels import SHARED_LIMIT, compile_report, in_interpreter

# images, dimension, temperature, first and last image classified: one, odd tails, more than a tile, a rank's own rows
CONTRASTIVE = [(1, 4, 0.5, 0, 1), (2, 3, 0.1, 0, 2), (70, 130, 0.01, 3, 70), (150, 20, 0.5, 100, 110), (40, 16, 0.001, 0, 40)]
GRAM = [(1, 2, 3), (3, 9, 20), (2, 33, 130), (2, 64, 128)]  # groups, images a group, dimension


def relative_errors(found: tuple, expected: tuple) -> list[float]:
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, expected, strict=True)]


def nt_xent_whole(z: torch.Tensor, temperature: float, start: int, stop: int) -> torch.Tensor:
    """Chen et al. 2020, eq. 1, all logits at once."""
    images, everyone = z.shape[1], z.flatten(0, 1)
    logits = (everyone @ everyone.T / temperature).fill_diagonal_(-torch.inf)
    views = torch.arange(2 * images).view(2, images)
    classified, partners = views[:, start:stop].flatten(), views.flip(0)[:, start:stop].flatten()
    return cross_entropy(logits[classified], partners)


def gram_whole(z: torch.Tensor) -> torch.Tensor:
    """CARE, sec. 3: the mean over ordered pairs of different images of one group."""
    groups, images = z.shape[1:3]
    apart = z[0] @ z[0].mT - z[1] @ z[1].mT
    return (apart.square() * (1 - torch.eye(images))).sum() / (groups * images * (images - 1))


def with_gradient(formula: Callable, z: torch.Tensor, *arguments: float) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, by autograd."""
    z = z.double().requires_grad_()
    loss = formula(z, *arguments)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def contrastive_errors() -> list[list[float]]:
    from trainer.ops.kernels.contrastive import nt_xent_fused

    torch.manual_seed(0)
    errors = []
    for n, d, *arguments in CONTRASTIVE:
        z = normalize(torch.randn(2, n, d), dim=2)
        z[:, -1] = z[:, 0]  # two identical images
        found, without = nt_xent_fused(z, *arguments, True), nt_xent_fused(z, *arguments, False)
        assert torch.equal(found[0], without[0])
        errors.append(relative_errors(found, with_gradient(nt_xent_whole, z, *arguments)))
    return errors


def gram_errors() -> list[list[float]]:
    from trainer.ops.kernels.gram import gram_equivariance_fused

    torch.manual_seed(0)
    errors = []
    for shape in GRAM:
        z = normalize(torch.randn(2, *shape), dim=3)
        z[1] = normalize(z[0] + 0.01 * z[1], dim=2)
        found, without = gram_equivariance_fused(z, True), gram_equivariance_fused(z, False)
        assert torch.equal(found[0], without[0])
        errors.append(relative_errors(found, with_gradient(gram_whole, z)))
    return errors


def all_errors() -> dict[str, list[list[float]]]:
    return {"contrastive": contrastive_errors(), "gram": gram_errors()}


@pytest.fixture(scope="module")
def errors() -> dict[str, list[list[float]]]:
    return in_interpreter(all_errors)


def test_contrastive_kernels_have_the_loss_and_gradient_of_float64(errors):
    for (*_, temperature, _, _), (loss, slope) in zip(CONTRASTIVE, errors["contrastive"], strict=True):
        assert loss < 5e-7
        assert slope < max(1e-6, 1e-8 / temperature)  # the rounding of a logit, which is up to 1 / temperature


def test_gram_kernel_has_the_loss_and_gradient_of_float64(errors):
    assert all(error < 1e-6 for case in errors["gram"] for error in case)


@pytest.mark.parametrize("d", [10, 128, 512])
def test_contrastive_kernels_fit_sm_90(d):
    from trainer.ops.kernels.contrastive import TILES, gradient_kernel, negatives_kernel

    floats = dict.fromkeys(("z", "total", "wrong", "out"), "*fp32") | dict.fromkeys(("scale", "factor"), "fp32")
    signature = floats | dict.fromkeys(("images", "start", "count"), "i32")
    negatives = compile_report(negatives_kernel, signature, {"d": d, **TILES}, num_warps=4, num_stages=2)
    gradient = compile_report(gradient_kernel, signature, {"d": d, "D": 16 if d == 10 else 128, **TILES}, num_warps=4)
    assert negatives.spills == gradient.spills == 0
    assert max(negatives.shared, gradient.shared) <= SHARED_LIMIT // 2  # two programs share a multiprocessor


@pytest.mark.parametrize("n", [16, 32, 64])
def test_gram_kernel_fits_sm_90(n):
    from trainer.ops.kernels.gram import gram_kernel

    pointers = dict.fromkeys(("z1", "z2", "loss", "slope1", "slope2"), "*fp32")
    constants = {"d": 128, "N": n, "BK": 32, "GRADIENT": True}
    report = compile_report(gram_kernel, pointers | {"images": "i32", "factor": "fp32"}, constants, num_warps=4, num_stages=2)
    assert report.spills == 0
    assert report.shared <= SHARED_LIMIT // 2

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_prep import synthetic
from trainer.config import Augmentation
from trainer.data.augment import crop_box, draw
from trainer.data.loader import Loader
from trainer.data.views import ViewSpec
from trainer.data.warp import canvas, displacement, modes, reach, warp

N = 32
TURNED = Augmentation(rotation=180, corners="reflect")
BENT = Augmentation(elastic=1.0)
BOTH = Augmentation(rotation=180, elastic=1.0)


def drawn(augmentation: Augmentation, size: int, n: int = N) -> dict[str, np.ndarray]:
    return draw(augmentation, seed=0, view="v", copy=0, step=0, rows=range(n), side=modes(size))


def pictures(size: int, n: int = N) -> torch.Tensor:
    """uint8 [n, 3, size, size]: drawn shapes with noise."""
    images = synthetic.draw(0, 0, np.arange(n), size)[0]
    noise = np.random.default_rng(0).normal(0, 12, images.shape)
    return torch.from_numpy(np.clip(images + noise, 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def rotated(images: torch.Tensor, angles: np.ndarray) -> torch.Tensor:
    turn = [F.rotate(x[None], float(angle), InterpolationMode.BILINEAR)[0] for x, angle in zip(images.float(), angles)]
    return torch.stack(turn)


def bent(images: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """torchvision's elastic transform of the displacements [N, 2, S, S], which it counts in halves of the image."""
    halves = (2 * pixels / images.shape[-1]).permute(0, 2, 3, 1)
    return torch.stack([F.elastic(x[None], field[None])[0] for x, field in zip(images.float(), halves)])


def displaced(draws: dict[str, np.ndarray], size: int) -> torch.Tensor:
    return displacement(torch.from_numpy(draws["field"]), BOTH.elastic_alpha, size)


@pytest.mark.parametrize("size", [32, 33, 96, 224])
def test_rotation_and_elastic_transform_are_torchvisions(size):
    """0.03 of 255: both place the points in float32, to about 1e-5 pixels, and noise changes by 100 from pixel to pixel."""
    images, draws = pictures(size, 8), drawn(BOTH, size, 8)
    ours = warp(images, draws, replace(TURNED, corners="zero"), size)
    assert (ours - rotated(images, draws["angle"])).abs().max() < 0.03
    ours = warp(images, draws | {"angle": 0 * draws["angle"]}, replace(BENT, corners="zero"), size)
    assert (ours - bent(images, displaced(draws, size))).abs().max() < 0.03


def test_a_view_is_turned_and_then_bent_in_one_resampling():
    """Of a plane, which interpolation leaves exact: where torchvision's two steps see no border, and not in the other order."""
    size = 64
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.stack([x * 3, y * 3, x + y]).expand(N, -1, -1, -1).byte()
    draws = drawn(BOTH, size)
    ours = warp(images, draws, replace(BOTH, corners="zero"), size)
    inner = slice(size // 4, -size // 4)
    apart = (ours - bent(rotated(images, draws["angle"]), displaced(draws, size)))[..., inner, inner].abs()
    assert apart.max() < 0.01
    other = (ours - rotated(bent(images, displaced(draws, size)), draws["angle"]))[..., inner, inner].abs()
    assert other.mean() > 1


def test_a_view_is_mirrored_before_it_is_turned(shards_of):
    images = pictures(32)
    whole = {"crop_scale": (1, 1), "crop_ratio": (1, 1), "jitter": 0, "grayscale": 0, "blur": 0}
    view = ViewSpec("v", 1, 32, Augmentation(**whole, flip=1, rotation=90, corners="zero"))
    options = {"batch_size": N, "seed": 0, "mean": (0, 0, 0), "std": (1 / 255,) * 3, "threads": 1, "shuffle": False}
    batch = next(Loader(shards_of(images.permute(0, 2, 3, 1).numpy()), [view], **options))
    expected = rotated(images.flip(-1), batch.draws["v"]["angle"][0])
    assert (batch.views["v"][0] - expected).abs().max() < 0.03


def test_zero_fill_is_torchvisions_two_steps():
    """A white image shows what is filled; the border of the two steps is softer by their second interpolation."""
    white, draws = torch.full((N, 3, 64, 64), 255, dtype=torch.uint8), drawn(BOTH, 64)
    ours = warp(white, draws, replace(BOTH, corners="zero"), 64)
    theirs = bent(rotated(white, draws["angle"]), displaced(draws, 64))
    assert ((ours > 127) != (theirs > 127)).float().mean() < 0.01
    assert (ours < 1).float().mean() > 0.05


@pytest.mark.parametrize("size", [64, 96])
def test_the_displacement_has_the_covariance_of_torchvisions(size):
    """Along one axis; the two are alike and independent. The modes are uniform in +-1, as torchvision's noise is."""
    blur = F.gaussian_blur(torch.eye(size)[None], [41, 1], [5.0, 5.0])[0].T
    theirs = blur @ blur.T
    unit = torch.eye(modes(size))[:, None, None, :] * torch.eye(modes(size))[0][:, None]  # across alone: [k, 1, k, k]
    ours = displacement(unit.expand(-1, 2, -1, -1).contiguous(), 2.0, size)[:, 0, 0].T * math.sqrt(size)
    ours = ours @ ours.T
    scale = theirs[size // 2, size // 2]
    assert (ours - theirs).abs().max() < 0.11 * scale  # 6 % of the variance at the border, which is twice this
    assert (ours - theirs)[16:-16, 16:-16].abs().max() < 0.002 * scale
    field = displaced(drawn(BENT, size, 400), size)[..., size // 2, size // 2]
    assert abs(field.std() / (50 * math.sqrt(1 / 3) * scale) - 1) < 0.1


@pytest.mark.parametrize("corners", ["reflect", "inscribed"])
def test_a_white_image_stays_white(corners):
    a = replace(BOTH, corners=corners)
    white = torch.full((N, 3, canvas(a, 32), canvas(a, 32)), 255, dtype=torch.uint8)
    assert (warp(white, drawn(a, 32), a, 32) > 254.99).all()


@pytest.mark.parametrize("corners", ["reflect", "inscribed", "zero"])
def test_a_linear_model_reads_the_angle_from_the_corners_of_zero_fill_alone(corners):
    """R2 on other pictures: of the turn modulo a quarter, from the brightness of each corner and its square."""
    n, a = 2000, Augmentation(rotation=90, corners=corners)
    draws = drawn(a, 32, n)
    views = warp(pictures(canvas(a, 32), n), draws, a, 32) / 255
    brightness = torch.stack([views[:, :, y : y + 3, x : x + 3].mean((1, 2, 3)) for y in (0, 29) for x in (0, 29)], 1)
    inputs = torch.cat([brightness, brightness**2, torch.ones(n, 1)], 1).double()
    turn = torch.from_numpy(np.abs(np.sin(2 * np.deg2rad(draws["angle"])))).double()[:, None]
    train, test = slice(0, n // 2), slice(n // 2, n)
    weights = torch.linalg.lstsq(inputs[train], turn[train]).solution
    explained = 1 - (turn[test] - inputs[test] @ weights).square().mean() / turn[test].var()
    assert explained > 0.5 if corners == "zero" else explained < 0.05


@pytest.mark.parametrize(("shape", "shape_known"), [((48, 48), True), ((40, 70), True), ((40, 70), False)])
def test_an_inscribed_view_shows_nothing_but_a_piece_of_the_image(shards_of, shape, shape_known):
    """Of an image that says where a pixel is, a turned crop is a plane without a fold; reflected borders fold it."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    folder = replace(shards_of([np.stack([3 * x, 3 * y, 0 * x], -1).astype(np.uint8)] * N), image_shape=None)
    folder = replace(folder, image_shape=shape) if shape_known else folder
    still = Augmentation(jitter=0, grayscale=0, blur=0, flip=0, rotation=90)
    line = torch.arange(32.0)
    plane = torch.stack([torch.ones(32, 32), *torch.meshgrid(line, line, indexing="ij")], -1).reshape(-1, 3)

    def fold(corners: str) -> torch.Tensor:
        view = ViewSpec("v", 1, 32, replace(still, corners=corners))
        options = {"batch_size": N, "seed": 0, "mean": (0, 0, 0), "std": (1 / 255,) * 3, "threads": 1, "shuffle": False}
        seen = next(Loader(folder, [view], **options)).views["v"][0, :, :2].reshape(2 * N, -1).T
        return (seen - plane @ torch.linalg.lstsq(plane, seen).solution).abs().amax(0)

    assert fold("inscribed").max() < 1  # levels: the graph's rounding; a pixel is three or less
    assert fold("reflect").median() > 6


def test_an_inscribed_view_is_the_middle_of_the_crop_that_was_drawn(shards_of):
    """So crops are as random as without rotation. An image that says where a pixel is tells the middle of a view."""
    y, x = np.mgrid[:80, :80]
    folder = shards_of([np.stack([3 * x, 3 * y, 0 * x], -1).astype(np.uint8)] * N)
    view = ViewSpec("v", 1, 32, Augmentation(crop_scale=(0.4, 1.0), jitter=0, grayscale=0, blur=0, flip=0, rotation=90))
    options = {"batch_size": N, "seed": 0, "mean": (0, 0, 0), "std": (1 / 255,) * 3, "threads": 1, "shuffle": False}
    batch = next(Loader(folder, [view], **options))
    box = crop_box(batch.draws["v"]["extent"][0], batch.draws["v"]["anchor"][0], 80, 80)
    middle = batch.views["v"][0, :, :2].mean((2, 3)).flip(1).numpy()  # down, across
    np.testing.assert_allclose(middle, 3 * (80 * (box[:, :2] + box[:, 2:]) / 2 - 0.5), atol=1)
    assert np.ptp(middle, axis=0).min() > 20


def test_the_inscribed_crop_depends_on_the_settings_and_not_on_the_angle():
    inscribed = Augmentation(rotation=90, corners="inscribed")
    assert reach(inscribed) == pytest.approx(math.sqrt(2))
    assert reach(replace(inscribed, rotation=20)) == pytest.approx(math.cos(math.pi / 9) + math.sin(math.pi / 9))
    assert reach(replace(inscribed, rotation=0)) == reach(replace(inscribed, corners="reflect")) == reach(None) == 1
    assert canvas(inscribed, 32) == 46


def test_without_rotation_and_elastic_transform_nothing_is_computed():
    pixels = pictures(32)
    assert warp(pixels, {}, None, 32) is pixels
    assert warp(pixels, {}, Augmentation(corners="inscribed"), 32) is pixels
    still = warp(pixels, drawn(Augmentation(rotation=90), 32) | {"angle": np.zeros(N, np.float32)}, TURNED, 32)
    assert (still - pixels).abs().max() < 1e-3

"""The drawings show the factors that they say: measured on the pixels, and drawn again by Pillow."""

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep import synthetic
from data_prep.synthetic import FACTORS


def vertices(shape: str) -> list[tuple[float, float]]:
    """Outline of a shape of radius 1, upright, y down."""
    if shape == "square":
        return [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]
    if shape == "cross":
        a, b = 0.28, 0.95
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    if shape == "triangle":
        return [(np.sin(t), -np.cos(t)) for t in 2 * np.pi * np.arange(3) / 3]
    return [(r * np.sin(t), -r * np.cos(t)) for t, r in zip(np.pi * np.arange(10) / 5, [1, 0.45] * 5, strict=True)]


@pytest.mark.parametrize("shape", ["square", "cross", "triangle", "star"])
def test_shape_place_size_and_turn_are_those_of_a_supersampled_polygon(shape: str) -> None:
    label, size, fine = synthetic.CLASSES.index(shape), 32, 16
    numbers = np.arange(label, 160, len(synthetic.CLASSES))
    _, factors = synthetic.draw(0, 0, numbers, size)
    covers = synthetic._coverage(numbers % len(synthetic.CLASSES), factors, size)
    for cover, row in zip(covers, factors, strict=True):
        known = dict(zip(FACTORS, row, strict=True))
        cos, sin = np.cos(2 * np.pi * known["orientation"]), np.sin(2 * np.pi * known["orientation"])
        points = [(cos * u - sin * v, sin * u + cos * v) for u, v in vertices(shape)]  # clockwise, as y points down
        outline = [
            tuple(size * fine * (known[axis] + known["scale"] * p) - 0.5 for axis, p in zip("xy", point, strict=True))
            for point in points
        ]
        canvas = Image.new("L", (size * fine, size * fine))
        ImageDraw.Draw(canvas).polygon(outline, fill=255)
        reference = np.asarray(canvas, float).reshape(size, fine, size, fine).mean((1, 3)) / 255
        assert abs(cover - reference).mean() < 0.006
        assert abs(cover - reference).max() < 0.5  # a tip thinner than a pixel


def test_hue_and_background_are_those_of_the_pixels() -> None:
    numbers = np.array([n for n in range(400) if synthetic.CLASSES[n % 8] in ("circle", "square", "triangle", "star", "cross")])
    images, factors = synthetic.draw(5, 0, numbers, 64)
    known = dict(zip(FACTORS, factors.T, strict=True))
    hues, grounds = [], []
    for image, x, y in zip(images, (64 * known["x"]).astype(int), (64 * known["y"]).astype(int), strict=True):
        hues.append(colorsys.rgb_to_hsv(*(image[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1)) / 255))[0])
        border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3)])
        grounds.append(colorsys.rgb_to_hsv(*border.mean(0) / 255)[2])
    away = abs((np.array(hues) - known["hue"] + 0.5) % 1 - 0.5)
    assert np.median(away) < 0.01
    assert away.max() < 0.05
    assert np.corrcoef(grounds, known["background"])[0, 1] > 0.97


def test_an_image_depends_on_its_number_alone() -> None:
    images, factors = synthetic.draw(0, 0, np.arange(40), 32)
    some = np.array([17, 3, 39])
    again, factors_again = synthetic.draw(0, 0, some, 32)
    np.testing.assert_array_equal(again, images[some])
    np.testing.assert_array_equal(factors_again, factors[some])
    for seed, pool in ((1, 0), (0, 1)):
        assert not (synthetic.draw(seed, pool, some, 32)[1] == factors[some]).any()


def test_factors_are_independent_and_fill_their_ranges() -> None:
    _, factors = synthetic.draw(0, 0, np.arange(4000), 8)
    assert abs(np.corrcoef(np.delete(factors, 2, 1).T) - np.eye(5)).max() < 0.06
    np.testing.assert_allclose(factors.min(0), [0, -1 / 12, 0.25, 0.25, 0.25, 0.1], atol=0.012)
    np.testing.assert_allclose(factors.max(0), [1, 1 / 12, 0.45, 0.75, 0.75, 0.9], atol=0.012)

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from data_prep import synthetic
from trainer.config import Augmentation
from trainer.data.augment import crop_box
from trainer.data.colour import colour
from trainer.data.views import ViewSpec

N = 64
SOME = Augmentation()
RNG = np.random.default_rng(0)
YIQ = np.array([[0.299, 0.587, 0.114], [0.59590059, -0.27455667, -0.32134392], [0.21153661, -0.52273617, 0.31119955]])


def pictures(size: int) -> np.ndarray:
    """uint8 [N, size, size, 3]: drawn shapes, with noise so that no pixel is like its neighbour."""
    images, _ = synthetic.draw(0, 0, np.arange(N), size)
    return np.clip(images + RNG.normal(0, 12, images.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def made(shards_of):
    """The pixels [N, 3, size, size] in 0..255 that the graph makes of images with the given draws, all others neutral."""
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    from trainer.data import pipeline

    def make(images, size: int, augmentation: Augmentation | None = SOME, shape_known=True, **draws) -> torch.Tensor:
        n = len(images)
        ones, zeros = np.ones(n, np.float32), np.zeros(n, np.float32)
        neutral = {"extent": np.ones((n, 2)), "anchor": np.zeros((n, 2))}
        neutral |= dict.fromkeys(("brightness", "contrast", "saturation"), ones)
        neutral |= dict.fromkeys(("flip", "hue", "gray", "sigma", "solarize"), zeros)
        drawn = {
            name: np.asarray(value, bool if name in ("flip", "gray", "solarize") else np.float32)[None]
            for name, value in (neutral | draws).items()
        }
        view = ViewSpec("v", 1, size, augmentation)
        folder = shards_of(images, name=f"images-{RNG.integers(1 << 40)}")
        folder = folder if shape_known else replace(folder, image_shape=None)
        graph = pipeline.build(
            folder,
            [view],
            lambda _: pipeline.to_arguments([view], {"v": drawn}, folder.image_shape),
            batch_size=n,
            rank=0,
            world_size=1,
            device_id=None,
            threads=1,
            seed=0,
            shuffle_buffer=0,
        )
        pixels = next(DALIGenericIterator([graph], ["view", "label", "index"], size=-1))[0]["view"]
        return colour(pixels, {} if augmentation is None else {k: v[0] for k, v in drawn.items()}, (0, 0, 0), (1 / 255,) * 3)

    return make


def tensor(images) -> torch.Tensor:
    """Float [N, 3, H, W] of 1: torchvision cuts fractions off on uint8, which DALI rounds."""
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) / 255


def difference(ours: torch.Tensor, theirs: list[torch.Tensor]) -> torch.Tensor:
    return (ours - 255 * torch.stack(theirs)).abs()


def uniform(low: float, high: float) -> np.ndarray:
    return RNG.uniform(low, high, N).astype(np.float32)


def test_neutral_draws_change_no_pixel(made):
    images = pictures(32)
    assert difference(made(images, 32), list(tensor(images))).max() < 1e-3


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_factors_are_torchvisions(made, name):
    images, factors = pictures(32), uniform(0.6, 1.4)
    adjust = getattr(F, f"adjust_{name}")
    theirs = [adjust(x, float(k)) for x, k in zip(tensor(images), factors)]
    assert difference(made(images, 32, **{name: factors}), theirs).mean() < 0.3


def test_brightness_contrast_and_saturation_in_a_row_are_torchvisions(made):
    images = pictures(32)
    b, c, s = uniform(0.6, 1.4), uniform(0.6, 1.4), uniform(0.6, 1.4)
    theirs = [
        F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(x, float(b[i])), float(c[i])), float(s[i]))
        for i, x in enumerate(tensor(images))
    ]
    assert difference(made(images, 32, brightness=b, contrast=c, saturation=s), theirs).mean() < 0.5


def test_grayscale_flip_and_blur_are_torchvisions(made):
    images, sigma = pictures(160), uniform(0.1, 2)
    x = tensor(images)
    assert difference(made(images, 160, gray=np.ones(N)), list(F.rgb_to_grayscale(x, 3))).mean() < 0.6
    assert difference(made(images, 160, flip=np.ones(N)), list(x.flip(-1))).max() < 1e-3
    blurred = [F.gaussian_blur(image, [17, 17], [float(s)] * 2) for image, s in zip(x, sigma)]
    assert difference(made(images, 160, sigma=sigma), blurred).mean() < 0.3


def test_solarisation_is_torchvisions_to_the_bit():
    pixels, chosen = torch.from_numpy(pictures(32)).permute(0, 3, 1, 2), RNG.integers(0, 2, N).astype(bool)
    still = dict.fromkeys(("brightness", "contrast", "saturation"), np.ones(N, np.float32))
    draws = still | {"hue": np.zeros(N, np.float32), "gray": np.zeros(N, bool), "solarize": chosen}
    ours = colour(pixels, draws, (0, 0, 0), (1 / 255,) * 3).round()
    theirs = torch.where(torch.from_numpy(chosen)[:, None, None, None], F.solarize(pixels, 128), pixels)
    assert torch.equal(ours, theirs.float())


def test_hue_rotates_the_chroma_of_yiq_and_is_near_torchvisions(made):
    images, turns = pictures(32), uniform(-0.1, 0.1)
    ours = made(images, 32, hue=turns)
    rotated = []
    for x, turn in zip(tensor(images), turns):
        c, s = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
        colours = np.linalg.inv(YIQ) @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]]) @ YIQ
        rotated.append(torch.einsum("ij,jhw->ihw", torch.from_numpy(colours).float(), x).clamp(0, 1))
    assert difference(ours, rotated).mean() < 0.3
    assert difference(ours, [F.adjust_hue(x, float(t)) for x, t in zip(tensor(images), turns)]).mean() < 15


@pytest.mark.parametrize(("source", "size"), [(32, 32), (96, 64), (48, 96)])
def test_crops_are_torchvisions_but_for_the_pixels_across_their_edge(made, source, size):
    images = pictures(source)
    height, width = RNG.integers(source // 2, source + 1, (2, N))
    top, left = RNG.integers(0, source - height + 1), RNG.integers(0, source - width + 1)
    extent = np.stack([height, width], 1) / source
    anchor = np.stack([top / np.maximum(1, source - height), left / np.maximum(1, source - width)], 1)
    boxes = zip(tensor(images), top.tolist(), left.tolist(), height.tolist(), width.tolist())
    theirs = [F.resized_crop(x, *box, [size, size], antialias=True) for x, *box in boxes]
    apart = difference(made(images, size, extent=extent, anchor=anchor), theirs)
    assert apart[..., 3:-3, 3:-3].mean() < 0.3  # what rounding leaves
    assert apart.mean() < 3


@pytest.mark.parametrize("shape_known", [True, False])
def test_crops_of_oblong_images_lie_where_crop_box_says(made, shape_known):
    y, x = np.mgrid[0:90, 0:150]
    images = [np.stack([x + 0.5, y + 0.5, 0 * x], -1).astype(np.uint8)] * N  # red says where across, green where down
    extent, anchor = np.sqrt(RNG.uniform(0.2, 1.0, (N, 2))), RNG.uniform(0, 1, (N, 2))
    pixels = made(images, 50, shape_known=shape_known, extent=extent, anchor=anchor)
    box = torch.from_numpy(crop_box(extent, anchor, 90, 150))
    centre = torch.stack([90 * (box[:, 0] + box[:, 2]), 150 * (box[:, 1] + box[:, 3])]) / 2 - 0.5
    assert (pixels[:, 1, 25].mean(-1) + pixels[:, 1, 24].mean(-1) - 2 * centre[0]).abs().max() < 1.5
    assert (pixels[:, 0, :, 25].mean(-1) + pixels[:, 0, :, 24].mean(-1) - 2 * centre[1]).abs().max() < 1.5
    across = (pixels[:, 0, 25, 40] - pixels[:, 0, 25, 10]) / 30 * 50
    assert (across - 150 * (box[:, 3] - box[:, 1])).abs().max() < 4


@pytest.mark.parametrize(("height", "width", "tolerance"), [(32, 32, 0), (96, 96, 0), (48, 96, 1)])
def test_a_known_shape_changes_no_crop(made, height, width, tolerance):
    """Squares to the bit; where the graph takes logarithms of an oblong's sides and numpy a root, an edge moves by 1e-7."""
    images = [image[:height, :width] for image in pictures(96)]
    draws = {"extent": np.sqrt(RNG.uniform(0.08, 1.0, (N, 2))), "anchor": RNG.uniform(0, 1, (N, 2))}
    apart = (made(images, 32, **draws) - made(images, 32, shape_known=False, **draws)).abs()
    assert apart.max() <= tolerance * 1.001
    assert apart.mean() < 1e-3


@pytest.mark.parametrize(("shape", "size", "shorter"), [((120, 168), 96, 110), ((168, 120), 96, 110), ((40, 32), 32, 32)])
def test_the_evaluation_view_is_torchvisions_resize_and_centre_crop(made, shape, size, shorter):
    height, width = shape
    images = [np.asarray(Image.fromarray(image).resize((width, height))) for image in pictures(128)]
    theirs = [F.center_crop(F.resize(x, shorter, antialias=True), [size, size]) for x in tensor(images)]
    assert difference(made(images, size, None), theirs)[..., 2:-2, 2:-2].mean() < 0.4


def test_multi_crop_decodes_once_and_a_copy_without_blur_has_no_blur(numbered):
    from trainer.data import pipeline

    a = Augmentation(blur=1.0, second={"blur": 0.0}, local={"crop_scale": [0.05, 0.4]})
    views = [ViewSpec("base", 2, 224, a.pair()), ViewSpec("local", 8, 96, a.variant("local"))]
    options = {"batch_size": 2, "rank": 0, "world_size": 1, "threads": 1, "seed": 0, "shuffle_buffer": 0}
    graph = pipeline.build(numbered(4), views, lambda _: [], device_id=None, **options)
    graph._build_graph()
    made = Counter(operator.name.strip("_").rsplit("_", 1)[0] for operator in graph._ops)
    assert made["Image"] == 1
    assert made["Resize"] == 10
    assert made["GaussianBlur"] == 9


@pytest.mark.parametrize("shape", [None, (8, 8)])
def test_the_graph_for_a_gpu_can_be_drawn_without_one(numbered, shape):
    from trainer.data import pipeline

    views = [ViewSpec("v", 2, 32, Augmentation()), ViewSpec("plain", 1, 32, None)]
    options = {"batch_size": 2, "rank": 0, "world_size": 1, "threads": 1, "seed": 0, "shuffle_buffer": 0}
    graph = pipeline.build(replace(numbered(4), image_shape=shape), views, lambda _: [], device_id=0, **options)
    graph._build_graph()
    assert [output.device for output in graph._graph_outputs] == ["gpu"] * 3 + ["cpu"] * 2

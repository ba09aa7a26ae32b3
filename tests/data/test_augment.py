import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import RandomResizedCrop

from trainer.config import Augmentation
from trainer.data.augment import crop_box, draw, draw_view
from trainer.data.views import ViewSpec

SOME = Augmentation()
ALL = Augmentation(jitter=1.0, blur=1.0, solarize=0.5, rotation=90, elastic=0.5)  # no parameter is constant
N = 4000


def drawn(augmentation: Augmentation = SOME, **which) -> dict[str, np.ndarray]:
    return draw(augmentation, **({"seed": 0, "view": "a", "copy": 0, "step": 0, "rows": range(N)} | which))


def of(view: ViewSpec, **which) -> dict[str, np.ndarray]:
    return draw_view(view, **({"seed": 0, "step": 3, "rank": 0, "batch_size": 12, "world_size": 1} | which))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def rate_is(hits: np.ndarray, p: float) -> bool:
    return abs(hits.mean() - p) < 4 * np.sqrt(p * (1 - p) / len(hits))


@pytest.mark.parametrize("augmentation", [SOME, Augmentation(crop_scale=(0.6, 1.0), crop_ratio=(0.5, 2.0))])
def test_crops_of_square_images_are_distributed_as_torchvisions(augmentation):
    side = 4096
    torch.manual_seed(0)
    crop = RandomResizedCrop(32, scale=augmentation.crop_scale, ratio=augmentation.crop_ratio)
    image = torch.empty(1, 1, 1).expand(1, side, side)
    made = [crop.make_params([image]) for _ in range(N)]
    top, left, height, width = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in made]).T / side
    box = crop_box(*(drawn(augmentation)[name] for name in ("extent", "anchor")), side, side)
    ours = {
        "top": box[:, 0],
        "left": box[:, 1],
        "height": box[:, 2] - box[:, 0],
        "width": box[:, 3] - box[:, 1],
        "area": (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]),
    }
    theirs = {"top": top, "left": left, "height": height, "width": width, "area": height * width}
    for name in ours:
        assert stats.ks_2samp(ours[name], theirs[name]).pvalue > 1e-3, name


def test_a_crop_that_never_fits_is_the_central_one():
    impossible = drawn(Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(2.0, 2.0)))
    box = crop_box(impossible["extent"], impossible["anchor"], 100, 100)
    np.testing.assert_allclose(box, np.broadcast_to([0.25, 0, 0.75, 1], box.shape))


def test_crops_of_oblong_images_fit_and_keep_their_ratio():
    one = drawn()
    for height, width in [(100, 400), (333, 250)]:
        top, left, bottom, right = crop_box(one["extent"], one["anchor"], height, width).T
        assert min(top.min(), left.min()) >= 0
        assert max(bottom.max(), right.max()) <= 1 + 1e-6
        ratio = (right - left) * width / ((bottom - top) * height)
        np.testing.assert_allclose(ratio, one["extent"][:, 1] / one["extent"][:, 0], rtol=1e-5)
        area, asked = (right - left) * (bottom - top), one["extent"].prod(1)
        shrunk = np.maximum(right - left, bottom - top) > 1 - 1e-6
        np.testing.assert_allclose(area[~shrunk], asked[~shrunk], rtol=1e-5)
        assert (area[shrunk] <= asked[shrunk] * (1 + 1e-5)).all()


def test_colours_flip_and_blur_have_the_distributions_of_the_settings():
    a = Augmentation(flip=0.3, jitter=0.7, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, grayscale=0.25, blur=0.6)
    one = drawn(a)
    jittered = one["brightness"] != 1
    assert rate_is(one["flip"], 0.3)
    assert rate_is(jittered, 0.7)
    assert rate_is(one["gray"], 0.25)
    assert rate_is(one["sigma"] > 0, 0.6)
    for name, low, high in [("brightness", 0.6, 1.4), ("contrast", 0.7, 1.3), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)]:
        assert stats.kstest(one[name][jittered], stats.uniform(low, high - low).cdf).pvalue > 1e-3, name
        assert (one[name][~jittered] == (0 if name == "hue" else 1)).all()
    assert stats.kstest(one["sigma"][one["sigma"] > 0], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


def test_rotation_elastic_field_and_solarisation_have_the_distributions_of_the_settings():
    one = drawn(Augmentation(rotation=90, elastic=0.4, solarize=0.2), side=3)
    assert stats.kstest(one["angle"], stats.uniform(-90, 180).cdf).pvalue > 1e-3
    assert rate_is(one["elastic"], 0.4)
    assert rate_is(one["solarize"], 0.2)
    assert one["field"].shape == (N, 2, 3, 3)
    assert not one["field"][~one["elastic"]].any()
    assert stats.kstest(one["field"][one["elastic"]].ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_an_augmentation_of_nothing_leaves_every_image_alone():
    off = dict.fromkeys(["flip", "jitter", "grayscale", "blur"], 0.0)
    one = drawn(Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), **off))
    np.testing.assert_array_equal(crop_box(one["extent"], one["anchor"], 7, 7), np.tile([0, 0, 1, 1], (N, 1)))
    assert all(not one[name].any() for name in ("flip", "gray", "sigma", "hue", "solarize", "angle", "elastic"))
    assert (one["brightness"] == 1).all()


def test_a_draw_is_a_pure_function_of_its_row():
    whole = drawn(rows=range(40))
    part = drawn(rows=range(17, 23))
    assert all(np.array_equal(whole[name][17:23], part[name]) for name in whole)
    assert same(drawn(rows=range(10**12, 10**12 + 2)), drawn(rows=range(10**12, 10**12 + 2)))
    stronger = drawn(dataclasses.replace(SOME, brightness=0.9, blur=0.0))  # a row spends its uniforms whatever the settings
    assert np.array_equal(stronger["anchor"], drawn()["anchor"])
    whole, part = drawn(ALL, side=3, rows=range(40)), drawn(ALL, side=3, rows=range(17, 23))
    assert all(np.array_equal(whole[name][17:23], part[name]) for name in whole)


def test_draws_are_those_of_the_committed_results():
    """Made by the first release, before there were rotations: whatever is added must leave them alone."""
    bits = hashlib.sha256()
    for shared_by in ("image", "group", "dataset"):
        view = ViewSpec("paired", 2, 32, SOME, shared_by, groups=4)
        for step in (0, 7):
            one = draw_view(view, seed=3, step=step, rank=1, batch_size=12, world_size=2)
            for name in ("extent", "anchor", "flip", "brightness", "contrast", "saturation", "hue", "gray", "sigma"):
                bits.update(np.ascontiguousarray(one[name]).tobytes())
    assert bits.hexdigest() == "3e90984a96448b8a455f4970e0f18afacf064a288b32b2f041c142b868b0d349"
    more = drawn(dataclasses.replace(SOME, solarize=0.5, rotation=90, elastic=0.5), side=3)
    assert all(
        np.array_equal(value, more[name]) for name, value in drawn().items() if name not in ("solarize", "angle", "elastic")
    )


def test_copies_draw_from_their_own_augmentations_and_one_alone_changes_nothing_of_the_other():
    a = Augmentation(blur=1.0, second={"blur": 0.0, "solarize": 1.0, "elastic": 0.5})
    both, plain = of(ViewSpec("v", 2, 32, a.pair())), of(ViewSpec("v", 2, 32, a))
    assert (both["sigma"][0] > 0).all()
    assert not both["sigma"][1].any()
    assert both["solarize"].tolist() == [[False] * 12, [True] * 12]
    assert not both["field"][0].any()
    assert both["field"][1].any((1, 2, 3)).tolist() == both["elastic"][1].tolist()
    assert all(np.array_equal(both[name][0], plain[name][0]) for name in plain)
    assert np.array_equal(both["extent"], plain["extent"])


@pytest.mark.parametrize("other", [{"seed": 1}, {"view": "b"}, {"copy": 1}, {"step": 1}, {"rows": range(1, N + 1)}])
def test_draws_of_another_seed_view_copy_step_or_row_are_independent(other):
    a, b = drawn(ALL, side=3), drawn(ALL, side=3, **other)
    for name in a:
        x, y = a[name].reshape(N, -1)[:, 0].astype(float), b[name].reshape(N, -1)[:, 0].astype(float)
        assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / np.sqrt(N), name


def test_the_parameters_of_a_row_are_independent_of_each_other():
    one = drawn(ALL, side=2)
    columns = {name: value for name, value in one.items() if value.ndim == 1} | {
        "y": one["anchor"][:, 0],
        "x": one["anchor"][:, 1],
    }
    columns |= {f"mode {i}": value for i, value in enumerate(one["field"].reshape(N, -1).T)}
    correlation = np.corrcoef([value.astype(float) for value in columns.values()]) - np.eye(len(columns))
    assert abs(correlation).max() < 4.5 / np.sqrt(N)


@pytest.mark.parametrize("shared_by", ["image", "group", "dataset"])
def test_ranks_draw_together_what_one_rank_draws_alone(shared_by):
    view = ViewSpec("v", 2, 32, ALL, shared_by, groups=4)
    alone = of(view)
    for world in (2, 4):
        ranks = [of(view, rank=rank, batch_size=12 // world, world_size=world) for rank in range(world)]
        assert same(alone, {name: np.concatenate([r[name] for r in ranks], 1) for name in alone})


def test_a_group_shares_its_draw_and_every_group_and_copy_has_its_own():
    one = of(ViewSpec("v", 2, 32, dataclasses.replace(ALL, elastic=1.0), "group", groups=4))
    for name, shape in [("extent", (2,)), ("angle", ()), ("field", (2, 8, 8))]:
        assert one[name].shape == (2, 12, *shape)
        groups = one[name].reshape(2, 4, 3, -1)
        assert (groups == groups[:, :, :1]).all()
        assert len(np.unique(groups[:, :, 0].reshape(8, -1), axis=0)) == 8


def test_a_data_set_shares_its_draws_over_images_steps_and_ranks():
    view = ViewSpec("v", 3, 32, SOME, "dataset")
    one = of(view)
    assert same(one, of(view, step=9, rank=1, world_size=2))
    assert all((value == value[:, :1]).all() for value in one.values())
    assert len(np.unique(one["extent"][:, 0], axis=0)) == 3

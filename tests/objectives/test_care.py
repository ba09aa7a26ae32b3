"""CARE's equivariance term by rotation fits: it trains, and refuses the scale of the other term."""

import math

import pytest

from methods import base, build, wrapped
from runs import losses, small_run
from trainer.errors import UserError


def test_the_rotation_term_trains(synthetic_shards, tmp_path):
    """On the same images from the same start its weight leaves half of it at most, and no collapse."""
    from trainer.loop import train

    left = {}
    for weight in (0, 3):
        out = tmp_path / f"weight {weight}"
        changes = {"objective__term": "rotation", "objective__weight": weight, "schedule__epochs": 2}
        assert train(small_run(synthetic_shards, out, **changes)) == 0
        record = list(losses(out).values())[-8:]
        left[weight] = sum(step["terms/equivariance"] for step in record) / 8
    assert left[3] < 0.5 * left[0]
    assert sum(step["terms/contrastive"] for step in record) / 8 < math.log(2 * 32 - 1) - 0.1  # of 32 images that are one


def test_the_released_scale_is_of_the_gram_term_only():
    with pytest.raises(UserError, match="term is 'rotation'"):
        build(wrapped("care", base("simclr"), term="rotation", reference_scale=True))

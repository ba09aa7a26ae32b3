"""Evaluating a checkpoint: what is written, that it repeats, and what is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.checkpoint import Checkpoints, Progress
from trainer.config import load_run
from trainer.data.shards import ShardFolder
from trainer.engine.world import World
from trainer.errors import UserError
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.report import KEYS
from trainer.objectives.objective import build_objective

SMALL = {"images": 48, "draws": 3, "passes": 1, "batch_size": 100}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory, synthetic_shards):
    """Saves an untrained variant of the demo's model at step 7."""

    def save(settings):
        run = load_run("demo", {"data.shards": str(synthetic_shards)} | settings)
        torch.manual_seed(0)
        world = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))
        engine = SimpleNamespace(sharded=False, optimiser_state=dict)
        folder = tmp_path_factory.mktemp("run") / "checkpoints"
        return Checkpoints(folder, run, world, keep=1).save(Progress(step=7), build_objective(run), engine, b"")

    return save


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of):
    """An untrained CARE model of 8-dimensional embeddings."""
    return checkpoint_of({"objective.base.dim": 8, "model.args": {"channels": [8, 8, 16, 16]}})


@pytest.fixture(scope="module")
def result(checkpoint, synthetic_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate(checkpoint, synthetic_shards, out, **SMALL), out


def test_all_measures_figures_and_their_circumstances_are_written(result):
    returned, out = result
    written = json.loads((out / "metrics.json").read_text())
    assert written == returned
    assert set(KEYS) <= set(written["measures"])
    assert set(written["measures"]) == set(written["definitions"])
    assert written["checkpoint"]["step"] == 7
    assert written["split"] == "test"
    assert written["images"] == {"train": 450, "test": 50, "geometry": 48}
    assert sorted(path.name for path in out.iterdir()) == ["angles.png", "draws.json", "metrics.json", "views.png"]
    per_draw = json.loads((out / "draws.json").read_text())
    assert all(sum(counts) == 48 for counts in per_draw["cosines"])
    measures = written["measures"]
    assert measures["wahba_o"] <= measures["wahba_so"] <= measures["l_inv"]
    assert 0 <= measures["unexplained"] <= 1


def test_parts_of_the_representation_are_measured_by_name(checkpoint_of, synthetic_shards, tmp_path):
    base = {"name": "simclr", "dim": 8}
    clever = checkpoint_of({"objective.name": "clever", "objective.base": base, "model.args": {"channels": [8, 8, 16, 16]}})
    parts = ["full", "invariant", "equivariant"]
    written = evaluate(clever, synthetic_shards, tmp_path, **SMALL, parts=parts, under=["jitter", "rotation90_jitter"])
    measures = written["measures"]
    assert {
        f"{measure}{part}" for measure in ("knn", "linear", "hue_r2") for part in ("", *(f"_{p}" for p in parts[1:]))
    } <= set(measures)
    assert {"knn_jitter", "linear_rotation90_jitter", "linear_jitter_invariant"} <= set(measures)
    assert set(measures) == set(written["definitions"])
    assert len({measures[name] for name in ("hue_r2", "hue_r2_invariant", "hue_r2_equivariant")}) == 3
    with pytest.raises(UserError, match=r"'variant'.*one of full, invariant, equivariant"):
        evaluate(clever, synthetic_shards, tmp_path / "other", **SMALL, parts=["variant"])
    with pytest.raises(UserError, match=r"--under is roation90.*Did you mean 'rotation90_jitter'"):
        evaluate(clever, synthetic_shards, tmp_path / "other", **SMALL, under=["roation90"])


def test_two_evaluations_agree_exactly(result, checkpoint, synthetic_shards, tmp_path):
    assert evaluate(checkpoint, synthetic_shards, tmp_path, **SMALL)["measures"] == result[0]["measures"]


def test_another_seed_draws_other_transformations(result, checkpoint, synthetic_shards, tmp_path):
    other = evaluate(checkpoint, synthetic_shards, tmp_path, **SMALL, seed=1)["measures"]
    assert other["gamma"] != result[0]["measures"]["gamma"]
    assert other["knn"] == result[0]["measures"]["knn"]


def test_unlabelled_images_leave_out_what_needs_labels_and_say_so(checkpoint, synthetic_shards, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(synthetic_shards, shards)
    for path in shards.glob("*/manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": None, "factors": None}))
    result = evaluate(checkpoint, shards, tmp_path / "out", **SMALL)
    assert not {"knn", "linear", "hue_r2"} & set(result["measures"])
    assert "gamma" in result["measures"]
    assert any("kNN and linear are left out" in note for note in result["notes"])


def test_too_few_images_for_the_dimension_are_noted(checkpoint, synthetic_shards, tmp_path):
    notes = evaluate(checkpoint, synthetic_shards, tmp_path, **SMALL | {"images": 24})["notes"]
    assert any("fewer than 4 x 8" in note for note in notes)


def test_orientation_is_asked_only_of_shapes_that_show_it(synthetic_shards):
    from trainer.evaluation.evaluate import _factor
    from trainer.evaluation.features import Features

    folder = ShardFolder.open(synthetic_shards / "test")
    label = torch.arange(50) % 8
    features = Features({"plain": torch.arange(50.0)[None, :, None]}, label, torch.arange(50))
    kept, values = _factor(folder, features, "orientation")
    round_ones = torch.tensor([folder.classes.index(name) for name in ("circle", "ring")])
    assert torch.equal(kept[:, 0].long(), torch.arange(50)[~torch.isin(label, round_ones)])
    assert values.abs().max() <= 1 / 12
    assert _factor(folder, features, "hue")[1].square().sum(dim=1).allclose(torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "has not seen"),
        ({"split": "unlabeled"}, "unlabeled"),
        ({"shards": "nowhere"}, "nowhere"),
        ({"checkpoint": "nothing"}, "no checkpoint in nothing"),
        ({"draws": 0}, "--draws is 0"),
        ({"images": "many"}, "--images is many"),
        ({"seed": -1}, "--seed is -1"),
        ({"device": "tpu"}, "--device is tpu"),
        ({"images": 3}, "12 or more"),
        ({"device": "cuda"}, "--device"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_and_nothing_written(options, message, checkpoint, synthetic_shards, tmp_path):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = {"checkpoint": checkpoint, "shards": synthetic_shards, "out": tmp_path / "out"} | SMALL | options
    with pytest.raises(UserError, match=message):
        evaluate(**arguments)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_may_be_named_from_where_it_lies(checkpoint, synthetic_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert evaluate(checkpoint.name, synthetic_shards, tmp_path, **SMALL)["checkpoint"]["step"] == 7


def test_a_damaged_checkpoint_is_named(checkpoint, synthetic_shards, tmp_path):
    damaged = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, damaged)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"????????")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        evaluate(damaged, synthetic_shards, tmp_path / "out", **SMALL)


def test_the_command_ends_a_mistake_with_one_line(tmp_path):
    script = Path(__file__).parents[2] / "launch" / "evaluate.py"
    command = [
        sys.executable,
        str(script),
        "--checkpoint",
        "c",
        "--shards",
        "s",
        "--out",
        str(tmp_path / "o"),
        "--split",
        "train",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: --split is train")
    assert run.stderr.count("\n") == 1


def test_transformed_views_show_as_much_of_the_image_as_the_plain_one(synthetic_shards, monkeypatch):
    """Above 64 pixels that is the middle 7/8: a transformation that does nothing gives the evaluation view."""
    from trainer.data.loader import Loader
    from trainer.data.views import ViewSpec
    from trainer.evaluation import robustness

    monkeypatch.setitem(robustness.TRANSFORMATIONS, "nothing", replace(robustness.JITTER, jitter=0.0))
    views = [ViewSpec("plain", 1, 112, None), robustness.transformed("nothing", 112)]
    moments = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "shuffle_buffer": 1, "shuffle": False}
    loader = Loader(ShardFolder.open(synthetic_shards / "test"), views, batch_size=4, seed=0, **moments)
    found = next(iter(loader)).views
    assert (robustness.centre(found["nothing"], 112) - found["plain"]).abs().max() < 1.5 / 255

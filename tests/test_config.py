"""Settings: recipes resolve, mistakes are named with what to write instead."""

import pytest

from trainer.config import Run, from_tree, load_run, recipes, remarks, to_tree
from trainer.errors import UserError


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_resolves_and_survives_a_round_trip(recipe):
    run = load_run(recipe)
    assert from_tree(to_tree(run)) == run


def test_every_recipe_around_a_base_has_a_twin_which_is_the_base_alone():
    trees = {name: to_tree(load_run(name)) | {"recipe": "", "out": ""} for name in recipes()}
    for name, tree in trees.items():
        if "base" in tree["objective"]:
            assert tree | {"objective": tree["objective"]["base"]} in trees.values(), name


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"objective.wieght": 1}, "'weight'"),
        ({"optimiser.rl": 1}, "'lr'"),
        ({"optimizer.lr": 1}, "'optimiser'"),
        ({"objective.base.temprature": 1}, "'temperature'"),
        ({"objective.name": "cair"}, "'care'"),
        ({"objective.views": "share"}, "'shared'"),
        ({"engine.precision": "fp64"}, "fp32"),
        ({"data.batch_size": 1}, "at least 2"),
        ({"data.batch_size": 2.5}, "type int"),
        ({"data.batch_size": True}, "type int"),
        ({"optimiser.lr": "fast"}, "type float"),
        ({"optimiser.lr": "nan"}, "type float"),
        ({"augmentation.crop_scale": [0.2]}, "2 numbers"),
        ({"augmentation.crop_scale": [0.2, 1.5]}, "between 0.001 and 1.0"),
        ({"augmentation.crop_scale": [0.8, 0.2]}, "lower bound first"),
        ({"node": 4}, "'nodes'"),
        ({"schedule.epochs": 0}, "at least"),
        ({"data": 3}, "section"),
        ({"engine.compile": "true"}, "expected True or False. Write --engine.compile True"),
        ({"data.size.x": 1}, "type int"),
        ({"model.args": 4}, "mapping"),
        ({"augmentation.corners": "mirror"}, "inscribed, reflect, zero. Choose one of them"),
        ({"augmentation.local": {"local": {"blur": 0}}}, "unknown setting 'augmentation.local.local'"),
        ({"augmentation.second": {"blurr": 0}}, "'blur'"),
        ({"engine.kind": "ddp", "engine.zero_stage": 2}, "--engine.kind deepspeed"),
        ({"optimiser.name": "lars", "engine.zero_stage": 1}, "--engine.zero_stage 0"),
        ({"optimiser.weight_decay": 0, "optimiser.weight_decay_end": 0.4}, "from which the cosine starts"),
        ({"objective.base": {"name": "byol", "momentum_end": 0.9}}, "objective.base.momentum_end is 0.9.*does not fall"),
        ({"objective.base": {"name": "dino", "local_size": 48}}, "objective.base.local_size is 48, data.size 32"),
        ({"objective.term": "rotation", "objective.reference_scale": True}, "objective.term is 'rotation'"),
    ],
)
def test_a_mistake_is_named_with_the_cure(overrides, told):
    with pytest.raises(UserError, match=told.replace("(", r"\(")):
        load_run("care_cifar10", overrides)


def test_numbers_may_be_written_as_yaml_misreads_them(tmp_path):
    (tmp_path / "mine.yaml").write_text("inherit: care_cifar10\noptimiser: {lr: 3e-4}\nschedule: {epochs: 5}\n")
    run = load_run(str(tmp_path / "mine.yaml"), {"optimiser.weight_decay": "1e-6"})
    assert (run.optimiser.lr, run.schedule.epochs, run.optimiser.weight_decay, run.out) == (3e-4, 5.0, 1e-6, "runs/mine")


def test_choosing_another_objective_starts_its_settings_afresh():
    run = load_run("care_cifar10", {"objective.name": "simclr", "objective.temperature": 0.3})
    assert (run.objective.name, run.objective.temperature) == ("simclr", 0.3)


def test_the_order_of_flags_does_not_matter():
    flags = {"objective.temperature": 0.3, "objective.name": "simclr"}
    assert load_run("care_cifar10", flags) == load_run("care_cifar10", dict(reversed(flags.items())))


def test_a_recipe_that_inherits_itself_is_refused(tmp_path):
    (tmp_path / "loop.yaml").write_text(f"inherit: {tmp_path / 'loop.yaml'}\n")
    with pytest.raises(UserError, match="inherits itself"):
        load_run(str(tmp_path / "loop.yaml"))


def test_a_recipe_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"bad\.yaml is not YAML"):
        load_run(str(tmp_path / "bad.yaml"))
    with pytest.raises(UserError, match="care_cifar10"):
        load_run("care_cifar_10")


def test_a_run_shorter_than_its_warm_ups_may_run_and_is_told_so():
    short = {"schedule.epochs": 5, "schedule.warmup_epochs": 6, "objective.base": {"name": "dino", "local_size": 16}}
    told = remarks(load_run("care_cifar10", short | {"objective.base.temperature_warmup_epochs": 30}))
    assert {tuple(remark.split()[:2]) for remark in told} == {
        ("schedule.warmup_epochs", "6"),
        ("objective.base.temperature_warmup_epochs", "30"),
    }
    assert not any(remarks(load_run(recipe)) for recipe in recipes())


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        load_run("demo").seed = 1
    assert isinstance(load_run("demo"), Run)


def test_a_recipe_of_ones_own_inherits_from_its_folder(tmp_path):
    (tmp_path / "caug.yaml").write_text("inherit: demo\naugmentation: {rotation: 90}\n")
    (tmp_path / "caug_plus.yaml").write_text("inherit: caug.yaml\naugmentation: {elastic: 0.5}\n")
    augmentation = load_run(str(tmp_path / "caug_plus.yaml")).augmentation
    assert (augmentation.rotation, augmentation.elastic) == (90, 0.5)
    (tmp_path / "caug.yaml").unlink()
    with pytest.raises(UserError, match=r"no recipe 'caug.yaml', which .*caug_plus.yaml inherits"):
        load_run(str(tmp_path / "caug_plus.yaml"))

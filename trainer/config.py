"""Every setting of a run, typed and validated: a recipe (YAML) plus overrides become one frozen `Run`.

A recipe may `inherit` another and lists only what differs. Unknown keys are errors that offer the nearest valid name.
"""

import dataclasses
import difflib
import importlib
import json
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from trainer.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
FLAGS = ("nodes", "dry_run")  # of launch/train.py, beside the settings
CHOICES = ("objective", "base")  # sections whose `name` decides which settings they hold


def setting(default: Any, about: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its sentence and its closed range [low, high], which applies to every number in it."""
    metadata = {"about": about, "low": low, "high": high}
    if callable(default):  # a section or a container: each settings object gets its own
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Augmentation:
    """What one draw of the view distribution contains (CARE, app. of settings; SimCLR's family)."""

    crop_scale: tuple[float, float] = setting((0.2, 1.0), "area of the random crop, fraction of the image", low=1e-3, high=1.0)
    crop_ratio: tuple[float, float] = setting((0.75, 4 / 3), "width / height of the random crop", low=0.1, high=10)
    flip: float = setting(0.5, "probability of a horizontal flip", low=0.0, high=1.0)
    jitter: float = setting(0.8, "probability of the colour jitter", low=0.0, high=1.0)
    brightness: float = setting(0.4, "brightness factor drawn from 1 +- this", low=0.0, high=1.0)
    contrast: float = setting(0.4, "contrast factor drawn from 1 +- this", low=0.0, high=1.0)
    saturation: float = setting(0.4, "saturation factor drawn from 1 +- this", low=0.0, high=1.0)
    hue: float = setting(0.1, "hue shift drawn from +- this, in turns of the colour circle", low=0.0, high=0.5)
    grayscale: float = setting(0.2, "probability of dropping the colour", low=0.0, high=1.0)
    blur: float = setting(0.5, "probability of a Gaussian blur", low=0.0, high=1.0)
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), "standard deviation of the blur, pixels", low=0.0, high=100)
    solarize: float = setting(0.0, "probability of inverting the values from 128 of 255 on", low=0.0, high=1.0)
    rotation: float = setting(0.0, "angle drawn from +- this, degrees; 0 turns nothing", low=0.0, high=180.0)
    corners: Literal["inscribed", "reflect", "zero"] = setting(
        "inscribed",
        "of a turned view; inscribed: real pixels, the view is what can turn inside the crop; reflect: the crop mirrored at "
        "its border, in which a network can see the angle; zero: black, which tells it",
    )
    elastic: float = setting(0.0, "probability of an elastic transform, after the rotation", low=0.0, high=1.0)
    elastic_alpha: float = setting(100.0, "its strength: pixels move by alpha / 61, root mean square", low=0.0, high=1000.0)
    second: dict[str, Any] = setting(dict, "what differs in the second view of a pair, by the names of this section")
    local: dict[str, Any] = setting(dict, "what differs in the small crops of multi-crop methods")

    def variant(self, name: Literal["second", "local"]) -> "Augmentation":
        """This distribution with what differs in the second view, or in the small crops."""
        alone = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("second", "local")}
        _refuse_unknown(getattr(self, name), alone, f"augmentation.{name}")
        tree = alone | getattr(self, name)
        varied: Augmentation = _build(Augmentation, tree, f"augmentation.{name}")
        return varied

    def pair(self) -> "tuple[Augmentation, Augmentation]":
        """Of the two views of a pair."""
        return self, self.variant("second")


@dataclass(frozen=True)
class Data:
    """Where the shards are and how they become batches."""

    shards: str = setting("shards/synthetic", "folder that make_shards.py wrote, with train/ and val/ inside")
    size: int = setting(32, "height and width of a view, pixels", low=8, high=1024)
    batch_size: int = setting(256, "images per step over all ranks", low=2)
    shuffle_buffer: int = setting(4096, "images a rank's shuffle buffer holds", low=1)
    threads: int = setting(2, "DALI's worker threads per rank", low=1, high=256)
    mean: tuple[float, float, float] = setting((0.485, 0.456, 0.406), "channel means, of 1", low=0.0, high=1.0)
    std: tuple[float, float, float] = setting((0.229, 0.224, 0.225), "channel standard deviations, of 1", low=1e-3, high=1.0)


@dataclass(frozen=True)
class Model:
    """The backbone: any timm model without its classifier."""

    backbone: str = setting("resnet18", "timm model name")
    stem: Literal["auto", "small", "strided", "standard"] = setting(
        "auto",
        "of a ResNet; small: 3x3 convolution without max-pool, for small images; strided: the same with stride 2, a quarter "
        "of the work; standard: timm's; auto: small below 64 px, else standard",
    )
    drop_path: float = setting(0.0, "stochastic depth rate", low=0.0, high=1.0)
    args: dict[str, Any] = setting(dict, "further arguments of timm.create_model")


@dataclass(frozen=True)
class Optimiser:
    """A timm optimiser."""

    name: Literal["adam", "adamw", "sgd", "lars"] = setting("adamw", "timm optimiser name")
    lr: float = setting(1e-3, "peak learning rate for the batch size of the recipe", low=0.0)
    weight_decay: float = setting(1e-6, "weight decay; biases and norms are exempt", low=0.0)
    weight_decay_end: float = setting(0.0, "weight decay at the end, half a cosine away; 0: constant", low=0.0)
    momentum: float = setting(0.9, "momentum of sgd and lars", low=0.0, high=1.0)
    clip_norm: float = setting(0.0, "largest gradient norm; 0 leaves gradients alone", low=0.0)


@dataclass(frozen=True)
class Schedule:
    """How long, and the learning rate on the way."""

    epochs: float = setting(10, "passes over the training images", low=1e-6)
    warmup_epochs: float = setting(0, "linear warm-up, epochs", low=0.0)
    name: Literal["cosine", "constant"] = setting("cosine", "shape after the warm-up")
    min_lr: float = setting(0.0, "learning rate at the end of the cosine", low=0.0)


@dataclass(frozen=True)
class Engine:
    """How the step is computed and spread over ranks."""

    kind: Literal["ddp", "deepspeed"] = setting("deepspeed", "what synchronises the gradients")
    zero_stage: int = setting(0, "DeepSpeed ZeRO stage", low=0, high=2)
    precision: Literal["fp32", "bf16"] = setting("bf16", "autocast type of the encoder; losses are fp32 always")
    channels_last: bool = setting(True, "memory format of convolutions")
    compile: bool = setting(False, "torch.compile the encoder")
    sync_batchnorm: bool = setting(False, "batch statistics over all ranks, for every objective alike")
    timeout_minutes: float = setting(10.0, "longest wait for another rank before the run fails", low=0.1, high=1440)


@dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep. The last step, and a step whose kNN is measured, are always save points."""

    every_steps: int = setting(0, "steps between checkpoints; 0: one an epoch", low=0)
    keep: int = setting(3, "newest checkpoints kept, besides the best by the validation split", low=1)


@dataclass(frozen=True)
class Tracking:
    """What is recorded where. metrics.jsonl in the run's folder is always written and is the truth."""

    uri: str = setting("sqlite:///runs/mlflow.db", "MLflow tracking URI; empty turns MLflow off")
    experiment: str = setting("care", "MLflow experiment")
    log_every: int = setting(10, "steps between records", low=1)
    knn_every_epochs: int = setting(0, "epochs between kNN measures on the validation split; 0: at the end only", low=0)


@dataclass(frozen=True)
class Run:
    """A whole run. Two runs with equal settings on equal worlds give equal weights on the CPU."""

    recipe: str = setting("", "name of the recipe, or path of a YAML file")
    out: str = setting("", "folder of the run; empty: runs/RECIPE")
    seed: int = setting(0, "seed of everything random", low=0, high=2**31 - 1)
    data: Data = setting(Data, "shards and batches")
    augmentation: Augmentation = setting(Augmentation, "the view distribution")
    model: Model = setting(Model, "the backbone")
    objective: Any = setting(None, "a registered objective: its `name` chooses the settings beside it")
    optimiser: Optimiser = setting(Optimiser, "the optimiser")
    schedule: Schedule = setting(Schedule, "length and learning rate")
    engine: Engine = setting(Engine, "precision and parallelism")
    checkpoint: Checkpoint = setting(Checkpoint, "saving")
    tracking: Tracking = setting(Tracking, "recording")

    # Settings that may change between a run and its continuation: they leave losses and weights as they are.
    free: ClassVar[tuple[str, ...]] = (
        "out",
        "recipe",
        "data.shards",
        "data.threads",
        "engine.timeout_minutes",
        "checkpoint",
        "tracking",
    )


def load_run(recipe: str, overrides: dict[str, Any] | None = None) -> Run:
    """Resolve a recipe and dotted overrides.

    Args:
        recipe: name of a YAML file in trainer/recipes, or a path.
        overrides: {"section.key": value}, as the command line gives them.

    Returns: the validated Run.

    Raises:
        UserError: unknown recipe or key (nearest valid name offered), wrong type, value out of range, settings that exclude
            each other.
    """
    flags: dict[str, Any] = {}
    for dotted, value in (overrides or {}).items():
        for key in reversed(dotted.split(".")):
            value = {key: value}
        flags = _merge(flags, value)
    tree = _merge(_read_recipe(recipe), flags)
    tree["recipe"] = recipe
    tree["out"] = tree.get("out") or f"runs/{Path(recipe).stem}"
    run = from_tree(tree)
    check(run)
    return run


def check(run: Run) -> None:
    """Refuse settings of which each is good and the combination is not; an objective's own `check` is asked too.

    Checkpoints are read without it: what trained once can be evaluated.
    """
    engine, optimiser = run.engine, run.optimiser
    if engine.kind == "ddp" and engine.zero_stage:
        found = f"engine.zero_stage is {engine.zero_stage} with engine.kind ddp"
        raise UserError(found, "DeepSpeed, whose stage it is", "Use --engine.kind deepspeed.")
    if optimiser.name == "lars" and engine.zero_stage:
        raise UserError(
            f"optimiser.name is 'lars' with engine.zero_stage {engine.zero_stage}",
            "whole tensors, whose norms LARS needs and ZeRO's flat partitions do not have",
            "Use --engine.zero_stage 0.",
        )
    if optimiser.weight_decay_end and not optimiser.weight_decay:
        found = f"optimiser.weight_decay_end is {optimiser.weight_decay_end}, optimiser.weight_decay 0"
        raise UserError(found, "a decay from which the cosine starts", "Set optimiser.weight_decay above 0.")
    _registry()[run.objective.name].check(run.objective, run, "objective")


def remarks(run: Run) -> list[str]:
    """What is allowed and may surprise: a recipe's warm-ups outlast a run that an override shortens."""
    epochs = run.schedule.epochs
    spans = {key: value for key, value in flatten(to_tree(run)).items() if key.endswith("_epochs")}
    return [
        f"{key} {value:g} outlasts the run, schedule.epochs {epochs:g}"
        for key, value in spans.items()
        if key.startswith(("schedule.", "objective.")) and value > epochs
    ]


def from_tree(tree: dict[str, Any]) -> Run:
    """Build a Run from nested dictionaries, as `to_tree` returns them."""
    run: Run = _build(Run, tree, "")
    run.augmentation.variant("second"), run.augmentation.variant("local")  # a wrong key is an error now
    if run.objective is None:
        raise UserError("objective.name is missing", "the name of a registered objective", "Add `objective: {name: care}`.")
    return run


def to_tree(run: Run) -> dict[str, Any]:
    """Nested dictionaries of plain values, which `from_tree`, JSON and YAML round-trip."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run)))
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def choose(name: str, path: str) -> type:
    """The settings dataclass of the objective registered under `name`."""
    registry = _registry()
    if name not in registry:
        near = _nearest(name, registry)
        raise UserError(f"{path}.name is {name!r}", f"one of {', '.join(sorted(registry))}", near)
    settings: type = registry[name].Settings
    return settings


def _registry() -> dict[str, Any]:
    """The classes of objectives; importing them costs seconds."""
    objectives: dict[str, Any] = importlib.import_module("trainer.objectives.objective").registry()
    return objectives


def _read_recipe(recipe: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    if recipe in heirs:
        raise UserError(f"recipe {recipe!r} inherits itself", "a recipe that ends the chain", "Correct its `inherit`.")
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        found = f"no recipe {recipe!r}" + (f", which {heirs[-1]} inherits" if heirs else "")
        raise UserError(found, f"a YAML file or one of {', '.join(recipes())}", _nearest(recipe, recipes()))
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(
            f"{path} is not YAML ({' '.join(str(error).split())})", "a mapping of settings", "Correct it."
        ) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}", "a mapping of settings", "Correct it.")
    parent = tree.pop("inherit", None)
    if parent and (beside := path.parent / parent).is_file():  # one's own recipes inherit from their folder
        parent = str(beside)
    return _merge(_read_recipe(parent, (*heirs, recipe)), tree) if parent else tree


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Over wins; a section whose `name` changes is a different thing and starts afresh."""
    merged = dict(base)
    for key, value in over.items():
        old: Any = merged.get(key)
        nested = key != "args" and isinstance(old, dict) and isinstance(value, dict)  # a model's arguments go together
        named = nested and key in CHOICES and "name" in old and "name" in value
        other = named and old["name"] != value["name"]
        merged[key] = _merge(old, value) if nested and not other else value
    return merged


def _build(cls: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{path} is {tree!r}", "a section with keys of its own", f"Set {path}.KEY instead.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    _refuse_unknown(tree, fields, path)
    values = {
        key: _convert(hints[key], value, f"{path}.{key}".lstrip("."), fields[key].metadata) for key, value in tree.items()
    }
    missing = [n for n, f in fields.items() if n not in values and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise UserError(f"{path}.{missing[0]} is missing", "a value", f"Set {path}.{missing[0]}.")
    return cls(**values)


def _refuse_unknown(tree: dict[str, Any], keys: typing.Iterable[str], path: str) -> None:
    keys = list(keys)
    for key in tree:
        if key not in keys:
            where = f"{path}.{key}" if path else key
            near = _nearest(key, [*keys, *(() if path else FLAGS)])
            raise UserError(f"unknown setting {where!r}", f"a key of {path or 'the run'}: {', '.join(keys)}", near)


def _convert(hint: Any, value: Any, path: str, metadata: typing.Mapping[str, Any]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if hint is Any:
        if value is None:
            return None
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str):
            raise UserError(f"{path}.name is {name!r}", "the name of a registered objective", f"Set {path}.name.")
        return _build(choose(name, path), value, path)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{path} is {value!r}", f"one of {', '.join(map(str, args))}", _nearest(str(value), map(str, args)))
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path} is {value!r}", "a mapping", f"Write {path}: {{key: value}}.")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise UserError(
                f"{path} is {value!r}", f"{len(args)} numbers", f"Write {path}: [{', '.join(['0.5'] * len(args))}]."
            )
        numbers = tuple(_convert(a, v, path, metadata) for a, v in zip(args, value, strict=True))
        if len(numbers) == 2 and numbers[0] > numbers[1]:
            raise UserError(f"{path} is {value}", "the lower bound first", "Swap them.")
        return numbers
    return _in_range(_scalar(hint, value, path), path, metadata)


def _scalar(hint: type, value: Any, path: str) -> Any:
    """YAML reads 1e-3 as text and 10 as a whole number: both are good floats. Nothing else is bent."""
    wrong = UserError(f"{path} is {value!r}", f"a value of type {hint.__name__}", "Correct it.")
    if hint is str:
        return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else _raise(wrong)
    if hint is bool:
        switch = UserError(f"{path} is {value!r}", "True or False", f"Write --{path} True, in YAML true.")
        return value if isinstance(value, bool) else _raise(switch)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = float(value)
    except ValueError:
        raise wrong from None
    if number != number or number in (float("inf"), float("-inf")) or (hint is int and number != int(number)):
        raise wrong
    return hint(number)


def _in_range(value: Any, path: str, metadata: typing.Mapping[str, Any]) -> Any:
    low, high = metadata.get("low"), metadata.get("high")
    if isinstance(value, int | float) and ((low is not None and value < low) or (high is not None and value > high)):
        bounds = f"between {low} and {high}" if high is not None else f"at least {low}"
        raise UserError(f"{path} is {value}", f"a value {bounds}", f"Correct {path}.")
    return value


def _nearest(name: str, valid: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else "Choose one of them."


def _raise(error: Exception) -> Any:
    raise error

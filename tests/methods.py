"""Every registered method at a size for tests: small settings, a small encoder, and views to see. Not a test itself."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import Augmentation, check, from_tree
from trainer.data.views import Batch
from trainer.objectives.objective import Objective, registry

SIZE = 8  # pixels
HEAD = {"hidden": 12, "dim": 6}
TEACHER = {"momentum": 0.9, "momentum_end": 0.99}
BASES = {
    "simclr": HEAD | {"temperature": 0.3},
    "moco": HEAD | TEACHER | {"temperature": 0.3, "queue": 40},  # no multiple of a batch
    "moco_v3": HEAD | TEACHER | {"temperature": 0.3},
    "byol": HEAD | TEACHER,
    "simsiam": HEAD | {"bottleneck": 4},
    "barlow": HEAD,
    "vicreg": HEAD,
    "dino": TEACHER
    | {"hidden": 12, "bottleneck": 6, "out": 16, "local_crops": 2, "local_size": 8, "freeze_epochs": 0.5}
    | {"student_temperature": 0.3, "teacher_temperature": 0.2, "teacher_temperature_start": 0.2, "centre_momentum": 0.1},
}
WRAPPERS: dict[str, dict[str, Any]] = {"care": {"weight": 0.3, "groups": 4}}


def wraps(name: str) -> bool:
    """Whether an objective adds to a base."""
    return "base" in {field.name for field in dataclasses.fields(registry()[name].Settings)}


def base(name: str) -> dict[str, Any]:
    """The section of a recipe that chooses a base."""
    return {"name": name, **BASES.get(name, {})}


def wrapped(name: str, inside: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The section that puts a wrapper around a base."""
    return {"name": name, "base": inside, **WRAPPERS.get(name, {}), **settings}


def methods() -> dict[str, dict[str, Any]]:
    """Every base alone, and in every wrapper."""
    plain = {name: base(name) for name in registry() if not wraps(name)}
    wrappers = [name for name in registry() if wraps(name)]
    return plain | {f"{name} of {title}": wrapped(name, inside) for name in wrappers for title, inside in plain.items()}


def build(section: dict[str, Any], seed: int = 0) -> Objective:
    """A method on an encoder of two convolutions."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.GELU(),
        nn.Conv2d(8, 10, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    backbone.num_features = 10
    run = from_tree({"objective": section})
    check(run)
    return registry()[run.objective.name](backbone, run.objective, Augmentation(), SIZE)


def batch_of(views: dict[str, Tensor]) -> Batch:
    images = next(iter(views.values())).shape[1]
    return Batch(views, torch.arange(images), torch.full((images,), -1))

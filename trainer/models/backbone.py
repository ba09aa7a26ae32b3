"""Backbones: any timm model without its classifier, with a CIFAR stem where images are small."""

import difflib
from typing import Any

import timm
from torch import nn

from trainer.config import Model
from trainer.errors import UserError

SMALL = 64  # pixels: below this a stride-2 stem with max-pool throws most of the image away


def build_backbone(settings: Model, size: int) -> Any:
    """Create a timm model that maps [N, 3, size, size] to features [N, model.num_features].

    Raises:
        UserError: unknown model name, arguments that timm refuses, or a small stem for a model that has none.
    """
    arguments = dict(settings.args)
    if settings.drop_path:
        arguments["drop_path_rate"] = settings.drop_path
    if settings.backbone.startswith(("vit", "deit")):
        arguments = {"img_size": size, **arguments}
    try:
        model: Any = timm.create_model(settings.backbone, num_classes=0, **arguments)
    except RuntimeError as error:
        near = difflib.get_close_matches(settings.backbone, timm.list_models(), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "See timm.list_models()."
        raise UserError(f"model.backbone is {settings.backbone!r} ({error})", "the name of a timm model", hint) from error
    except TypeError as error:
        raise UserError(
            f"model.args is {settings.args} ({error})", f"arguments of {settings.backbone}", "Correct them."
        ) from error
    resnet = hasattr(model, "conv1") and hasattr(model, "maxpool")
    if settings.stem == "small" and not resnet:
        raise UserError(f"model.stem is 'small' for {settings.backbone}", "a ResNet", "Use --model.stem standard.")
    if settings.stem == "small" or (settings.stem == "auto" and resnet and size < SMALL):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model

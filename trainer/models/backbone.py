"""Backbones: any timm model without its classifier, with a CIFAR stem where images are small."""

import difflib
from typing import Any

import timm
import torch
from torch import Tensor, nn

from trainer.config import Model
from trainer.errors import UserError

SMALL = 64  # pixels: below this a stride-2 stem with max-pool throws most of the image away


def build_backbone(settings: Model, size: int, local_size: int | None = None) -> Any:
    """Create a timm model that maps [N, 3, size, size] to features [N, model.num_features].

    Args:
        settings: of the model.
        size: height and width of the views, pixels.
        local_size: of small crops, where there are any.

    Raises:
        UserError: unknown model name, arguments that timm refuses, small crops that the model cannot take, or a small stem
            for a model that has none.
    """
    arguments = dict(settings.args)
    local_size = local_size or size
    if settings.drop_path:
        arguments["drop_path_rate"] = settings.drop_path
    try:
        if getattr(timm.get_pretrained_cfg(settings.backbone), "fixed_input_size", False):  # position embeddings and windows
            several = {"dynamic_img_size": True} if local_size != size else {}
            arguments = {"img_size": size, **several, **arguments}
        model: Any = timm.create_model(settings.backbone, num_classes=0, **arguments)
    except RuntimeError as error:
        near = difflib.get_close_matches(settings.backbone, timm.list_models(), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "See timm.list_models()."
        raise UserError(f"model.backbone is {settings.backbone!r} ({error})", "the name of a timm model", hint) from error
    except (TypeError, AssertionError, ValueError) as error:
        if "dynamic_img_size" in str(error):
            found = f"objective.local_size is {local_size}, data.size {size}"
            raise UserError(found, f"views of one size for {settings.backbone}", "Set both alike.") from error
        raise UserError(
            f"model.args is {settings.args} ({error})",
            f"arguments of {settings.backbone}",
            "Correct them, or use --model.args {}.",
        ) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if local_size != size and local_size % patch[0]:
        found = f"objective.local_size is {local_size} for patches of {patch[0]} pixels"
        raise UserError(found, "a multiple of them", "Change objective.local_size.")
    # Some timm models end with a layer that num_features leaves out.
    model.num_features = getattr(model, "head_hidden_size", model.num_features)
    resnet = isinstance(getattr(model, "conv1", None), nn.Conv2d) and hasattr(model, "maxpool")
    stem = settings.stem if settings.stem != "auto" else "small" if resnet and size < SMALL else "standard"
    if stem == "standard":
        return model
    if not resnet:
        found = f"model.stem is {stem!r} for {settings.backbone}"
        raise UserError(found, "a ResNet with one convolution as its stem", "Use --model.stem standard.")
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, stride=2 if stem == "strided" else 1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def class_tokens(vit: Any, blocks: int, images: Tensor) -> Tensor:
    """The features of a ViT, then the class tokens of its last blocks, each after the final norm: [N, 1 + blocks, D].

    Patch features are timm's to give: `vit.forward_intermediates(images, indices=blocks, norm=True)`.
    """
    final, layers = vit.forward_intermediates(images, indices=blocks, return_prefix_tokens=True, norm=True)
    return torch.stack([vit.forward_head(final), *(prefix[:, 0] for _, prefix in layers)], dim=1)

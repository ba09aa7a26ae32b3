"""Backbones: stems that fit the images, features of the width that heads are told, errors that name the key."""

import pytest
import torch
from torch import nn

from trainer.config import Model
from trainer.errors import UserError
from trainer.models.backbone import build_backbone


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("resnet18", 32, {}),
        ("resnet50", 32, {}),
        ("vit_tiny_patch16_224", 32, {"patch_size": 4, "depth": 2}),
        ("mobilenetv3_small_050", 32, {}),
        ("swin_tiny_patch4_window7_224", 64, {"depths": [1, 1, 1, 1], "window_size": 2}),
    ],
)
def test_features_have_the_width_that_heads_are_told(name, size, args):
    backbone = build_backbone(Model(backbone=name, args=args), size).eval()
    assert backbone(torch.zeros(2, 3, size, size)).shape == (2, backbone.num_features)


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize(
    ("name", "width", "args"),
    [
        ("resnet18", 512, {}),
        ("resnet50", 2048, {}),
        ("vit_tiny_patch16_224", 192, {"depth": 2}),
        ("vit_small_patch16_224", 384, {"depth": 2}),
    ],
)
def test_the_papers_backbones_take_images_of_the_papers_sizes(name, width, args, size):
    vit = name.startswith("vit")
    backbone = build_backbone(Model(backbone=name, args=args | ({"patch_size": 4} if vit and size == 32 else {})), size).eval()
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, size, size)).shape == (1, width)
        if vit:  # patch features, for dense probes
            side = 8 if size == 32 else size // 16
            patches = backbone.forward_intermediates(
                torch.zeros(1, 3, size, size), indices=2, norm=True, intermediates_only=True
            )
            assert [layer.shape for layer in patches] == [(1, width, side, side)] * 2


@pytest.mark.parametrize(("size", "local_size", "patch"), [(32, 16, 4), (224, 96, 16)])
def test_a_vit_takes_small_crops_where_they_are_asked_for(size, local_size, patch):
    model = Model(backbone="vit_tiny_patch16_224", args={"depth": 1, "patch_size": patch})
    torch.manual_seed(0)
    plain = build_backbone(model, size).eval()
    torch.manual_seed(0)
    both = build_backbone(model, size, local_size).eval()
    images, crops = torch.randn(2, 3, size, size), torch.randn(2, 3, local_size, local_size)
    with torch.no_grad():
        assert torch.equal(plain(images), both(images))
        assert both(crops).shape == (2, 192)
        with pytest.raises(AssertionError):
            plain(crops)


@pytest.mark.parametrize(
    ("stem", "size", "left"), [("small", 32, 32), ("strided", 32, 16), ("standard", 32, 8), ("auto", 32, 32), ("auto", 96, 24)]
)
def test_a_stem_leaves_as_much_of_the_image_as_it_says(stem, size, left):
    backbone = build_backbone(Model(stem=stem), size)
    x = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(torch.zeros(2, 3, size, size)))))
    assert x.shape[-1] == left
    assert isinstance(backbone.maxpool, nn.MaxPool2d) == (left == size // 4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Model(backbone="resnet_18"), "'resnet18'"),
        (Model(args={"channel": [1]}), r"model\.args"),
        (Model(backbone="vit_tiny_patch16_224", stem="small"), r"model\.stem"),
    ],
)
def test_mistakes_are_named(settings, told):
    with pytest.raises(UserError, match=told):
        build_backbone(settings, 32)


def test_small_crops_that_a_model_cannot_take_are_refused():
    with pytest.raises(UserError, match=r"objective\.local_size is 14 for patches of 4 pixels.*multiple"):
        build_backbone(Model(backbone="vit_tiny_patch16_224", args={"patch_size": 4, "depth": 1}), 32, 14)
    with pytest.raises(UserError, match=r"views of one size"):
        build_backbone(Model(backbone="cait_xxs24_224", args={"depth": 1}), 64, 32)


def test_position_embeddings_and_biases_are_not_decayed():
    from trainer.config import load_run
    from trainer.engine.engine import build_optimiser
    from trainer.objectives.objective import build_objective

    vit = {"model.backbone": "vit_tiny_patch16_224", "model.args": {"patch_size": 8, "depth": 1}}
    run = load_run("demo", vit | {"model.stem": "auto"})
    objective = build_objective(run)
    optimiser = build_optimiser(objective, run.optimiser)
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]}
    backbone = objective.base.backbone
    assert id(backbone.pos_embed) not in decayed
    assert id(backbone.blocks[0].mlp.fc1.bias) not in decayed
    assert id(backbone.blocks[0].mlp.fc1.weight) in decayed

"""DINO: its loss against the paper's formula, its centre, temperature and frozen layer, small crops, and what is probed."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from methods import base, batch_of, build
from trainer.config import from_tree
from trainer.objectives.objective import build_objective
from trainer.objectives.siamese import Outputs, other_views

SMALL = {"name": "dino", "hidden": 12, "bottleneck": 6, "out": 16, "local_crops": 3, "local_size": 16}
VIT = {"backbone": "vit_tiny_patch16_224", "args": {"patch_size": 8, "depth": 4, "embed_dim": 24, "num_heads": 2}}


def vit(drop_path: float = 0.0, objective: dict | None = None):
    torch.manual_seed(0)
    return build_objective(from_tree({"objective": objective or SMALL, "model": VIT | {"drop_path": drop_path}}))


def views_of(objective, images: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return batch_of({v.name: torch.randn(v.count, images, 3, v.size, v.size, generator=generator) for v in objective.views()})


def paper(student: Tensor, teacher: Tensor, centre: Tensor, cold: float, warm: float) -> Tensor:
    """Caron et al. 2021, eq. 3, with the centre of sec. 3.1: pairs of a teacher view and another student view, one by one."""
    losses = []
    for g in range(2):
        for v in range(len(student)):
            if g != v:
                for s, t in zip(student[v], teacher[g], strict=True):
                    q = ((t - centre) / cold).exp()
                    p = (s / warm).exp()
                    losses.append(-((q / q.sum()) * (p / p.sum()).log()).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("views", [2, 5])
def test_the_loss_and_its_gradient_follow_the_paper(views):
    branch = build(base("dino") | {"teacher_temperature": 0.05, "teacher_temperature_start": 0.05}).double().branch
    student = torch.randn(views, 7, 16, dtype=torch.float64, requires_grad=True)
    teacher, branch.centre = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    found, _ = branch.loss(Outputs(student, teacher, student))
    expected = paper(student, teacher, branch.centre, 0.05, branch.settings.student_temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    slopes = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    assert (slopes[0] - slopes[1]).norm() < 1e-12 * slopes[1].norm()


def test_two_global_and_eight_small_crops_make_eighteen_pairs():
    """Of every entry (g, v): its own number, so that none is left out, doubled or of a view with itself."""
    pairs = other_views(10 * torch.arange(2)[:, None] + torch.arange(10))
    assert sorted(pairs.tolist()) == sorted(10 * g + v for g in range(2) for v in range(10) if g != v)
    assert len(pairs) == 18


def test_logits_are_cosines_with_prototypes_of_which_the_length_does_not_matter():
    head = build(base("dino")).branch.projector
    features = torch.randn(5, 10)
    z, w = head.mlp(features), head.prototypes
    expected = torch.cosine_similarity(z[:, None], w[None], dim=-1)
    assert torch.allclose(head(features), expected, atol=1e-6)
    w.data *= torch.rand(len(w), 1) + 0.5
    assert torch.allclose(head(features), expected, atol=1e-6)


def test_the_centre_is_the_moving_average_of_the_teachers_outputs():
    """On two ranks it is that of one: test_distributed compares it."""
    objective = build(base("dino") | {"centre_momentum": 0.9}).double()
    expected = torch.zeros(16, dtype=torch.float64)
    for step in range(4):
        batch = batch_of({v.name: torch.randn(v.count, 6, 3, 8, 8, dtype=torch.float64) for v in objective.views()})
        objective(batch)
        outputs = objective.branch.target_projector(objective.teacher(batch.views["base"].flatten(0, 1)))
        expected = 0.9 * expected + 0.1 * outputs.mean(0)
        objective.after_step()
        assert torch.allclose(objective.branch.centre, expected, rtol=1e-12, atol=1e-15), step
    assert "branch.centre" in objective.state_dict()


def test_the_teachers_temperature_rises_in_a_line():
    start = {"teacher_temperature_start": 0.04, "teacher_temperature": 0.07, "temperature_warmup_epochs": 30.0}
    branch = build(base("dino") | start).branch
    for epoch, expected in [(0, 0.04), (10, 0.05), (15, 0.055), (30, 0.07), (31, 0.07), (99.5, 0.07)]:
        branch.before_step(epoch / 100, epoch)
        assert branch.temperature == pytest.approx(expected, rel=1e-12)
    branch = build(base("dino") | start | {"temperature_warmup_epochs": 0.0}).branch
    assert branch.temperature == 0.07


@pytest.mark.parametrize("wrapper", [{}, {"name": "clever", "head_norm": 1.0}])
def test_the_last_layer_is_still_in_the_first_epoch_and_then_learns(wrapper):
    section = base("dino") | {"freeze_epochs": 1.0}
    objective = build(wrapper | {"base": section} if wrapper else section)
    layers = {n: p for n, p in objective.named_parameters() if n.endswith("projector.prototypes")}
    assert len(layers) == (2 if wrapper else 1)
    optimiser = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    before = {n: p.detach().clone() for n, p in layers.items()}
    for step in range(6):
        objective.before_step(step / 6, epoch=step / 4)
        objective(views_of(objective, seed=step)).total.backward()
        for name, weight in layers.items():
            assert (weight.grad == 0).all() == (step < 4), (step, name)
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step()
        for name, weight in layers.items():
            assert torch.equal(weight, before[name]) == (step < 4), (step, name)


def test_a_frozen_layer_may_decay_but_does_not_turn():
    objective = build(base("dino"))
    layer = objective.branch.projector.prototypes
    optimiser = torch.optim.AdamW([layer], lr=0.1, weight_decay=0.4)
    before = layer.detach().clone()
    for step in range(3):
        objective.before_step(0.0, epoch=0.0)
        objective(views_of(objective, seed=step)).total.backward()
        optimiser.step()
    assert layer.norm() < 0.95 * before.norm()
    assert torch.allclose(normalize(layer, dim=1), normalize(before, dim=1), atol=1e-6)


def test_small_crops_pass_the_student_alone_at_their_own_size():
    objective = vit()
    seen = {"student": [], "teacher": []}
    for name, encoder in (("student", objective.backbone), ("teacher", objective.teacher.module)):
        encoder.register_forward_pre_hook(lambda _, images, name=name: seen[name].append(tuple(images[0].shape)))
    objective(views_of(objective)).total.backward()
    assert seen == {"student": [(12, 3, 32, 32), (18, 3, 16, 16)], "teacher": [(12, 3, 32, 32)]}
    assert objective.backbone.pos_embed.grad.abs().sum(-1).min() > 0


def test_local_crops_have_a_distribution_of_their_own():
    tree = {"objective": SMALL, "model": VIT, "augmentation": {"second": {"blur": 0.1}, "local": {"crop_scale": [0.05, 0.4]}}}
    base_view, local = build_objective(from_tree(tree)).views()
    assert [a.blur for a in base_view.augmentation] == [0.5, 0.1]
    assert (local.count, local.size, local.augmentation.crop_scale) == (3, 16, (0.05, 0.4))
    no_crops = build_objective(from_tree(tree | {"objective": SMALL | {"local_crops": 0}}))
    assert [view.name for view in no_crops.views()] == ["base"]
    assert not no_crops.backbone.dynamic_img_size


def test_depth_is_stochastic_for_the_student_alone():
    objective = vit(drop_path=0.5).train()
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(objective.encode(images), objective.encode(images))
    assert torch.equal(objective.encode(images, objective.teacher), objective.encode(images, objective.teacher))


def test_probes_read_the_teacher():
    objective = vit().eval()
    nn.init.normal_(objective.teacher.module.patch_embed.proj.weight)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        parts = objective.represent(images)
        assert torch.allclose(parts["full"], objective.teacher(images), atol=1e-6)
        assert not torch.allclose(parts["full"], objective.backbone(images), atol=1e-2)


def test_last4_is_the_class_token_after_each_of_the_last_four_blocks():
    objective = vit().eval()
    teacher, tokens = objective.teacher.module, []
    for block in teacher.blocks:
        block.register_forward_hook(lambda _, __, out: tokens.append(teacher.norm(out)[:, 0]))
    with torch.no_grad():
        parts = objective.represent(torch.randn(4, 3, 32, 32))
    assert torch.allclose(parts["last4"], torch.cat(tokens, dim=1), atol=1e-6)
    assert torch.equal(parts["last4"][:, -24:], parts["full"])


def test_a_run_with_small_crops_continues_to_the_same_bits(synthetic_shards, tmp_path):
    """The whole path once: multi-crop from DALI, a decaying weight decay, a last layer that thaws in the second epoch."""
    from runs import final_weights, losses
    from trainer.config import load_run
    from trainer.loop import train

    small = {
        "model.args": {"channels": [4, 8, 8, 16]},
        "objective.out": 32,
        "data.shards": str(synthetic_shards),
        "data.batch_size": 64,
        "optimiser.weight_decay_end": 0.1,
        "schedule.epochs": 2,
        "checkpoint.every_steps": 5,
        "tracking.uri": "",
        "engine.kind": "ddp",
    }
    whole, broken = (load_run("dino_cifar10_small", small | {"out": str(tmp_path / name)}) for name in ("whole", "broken"))
    train(whole)
    train(broken)
    for path in sorted((tmp_path / "broken" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    train(broken)
    assert len(losses(tmp_path / "whole")) == 14
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert final_weights(tmp_path / "broken") == final_weights(tmp_path / "whole")

"""CLeVER: its terms against loops over images and pairs, what each part is taught, what is probed, what is refused."""

import pytest
import torch
from test_dino import VIT, paper
from torch import Tensor

from methods import base, batch_of, build
from trainer.config import flatten, from_tree, load_run, to_tree
from trainer.errors import UserError
from trainer.objectives.clever import overlap
from trainer.objectives.objective import build_objective

FEATURES, CUT = 10, 8


def clever(name: str, **settings):
    objective = build({"name": "clever", "base": base(name), "weight": 0.7, "head_norm": 0.01} | settings).double()
    objective.before_step(0.5, epoch=5.0)
    return objective


def features(views: int, images: int = 5) -> tuple[Tensor, Tensor]:
    """Of the online encoder and of the teacher."""
    generator = torch.Generator().manual_seed(3)
    online, target = torch.randn(views + 2, images, FEATURES, dtype=torch.float64, generator=generator).split([views, 2])
    return online.requires_grad_(), target


def loss_of(objective, online: Tensor, target: Tensor):
    """The objective's loss where the encoders give these features."""
    objective.base.features = lambda pair, batch: (online, target if objective.base.teacher else online)
    return objective.loss(torch.zeros(0), batch_of({"base": torch.zeros(2, 1)}))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt())


def orthogonality(online: Tensor, target: Tensor, reference: bool) -> Tensor:
    values = [
        cosine(online[v, i], target[g, i])
        for g in range(2)
        for v in range(len(online))
        if v != g
        for i in range(online.shape[1])
    ]
    return abs(sum(values) / len(values)) if reference else sum(abs(value) for value in values) / len(values)


def balance(*pairs) -> Tensor:
    """Mean over pairs of heads of | ||theta_inv||^2 - ||theta_equi||^2 |."""
    norms = [[sum((p**2).sum() for p in head.parameters()) for head in pair] for pair in pairs]
    return sum(abs(a - b) for a, b in norms) / len(norms)


def of_dino(objective, online: Tensor, target: Tensor, reference: bool) -> list[Tensor]:
    settings, out = objective.settings.base, []
    for branch, part in ((objective.base.branch, slice(0, CUT)), (objective.equivariant, slice(CUT, None))):
        branch.centre = torch.randn(settings.out, dtype=torch.float64)
        with torch.no_grad():
            teacher = branch.target_projector.module(target[..., part])
        out.append((branch.projector(online[..., part]), teacher, branch.centre))
    temperatures = settings.teacher_temperature, settings.student_temperature
    (_, _, _), (student, teacher, centre) = out
    distributions = (student / temperatures[1]).softmax(-1), ((teacher - centre) / temperatures[0]).softmax(-1)
    return [
        paper(*out[0], *temperatures),
        orthogonality(*distributions, reference),
        balance((objective.base.branch.projector, objective.equivariant.projector)),
    ]


def of_simclr(objective, online: Tensor, target: Tensor, reference: bool) -> list[Tensor]:
    z, e = objective.base.branch.projector, objective.equivariant.projector
    invariant, equivariant = (
        (head(x.flatten(0, 1)).unflatten(0, (2, -1))) for head, x in ((z, online[..., :CUT]), (e, online[..., CUT:]))
    )
    rows, n = [*invariant[0], *invariant[1]], online.shape[1]
    s = torch.stack([torch.stack([cosine(a, b) for b in rows]) for a in rows]) / objective.settings.base.temperature
    others = s.masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    contrastive = (others.exp().sum(1).log() - s[torch.arange(2 * n), (torch.arange(2 * n) + n) % (2 * n)]).mean()
    return [contrastive, orthogonality(equivariant, equivariant, reference), balance((z, e))]


def of_simsiam(objective, online: Tensor, target: Tensor, reference: bool) -> list[Tensor]:
    branches = objective.base.branch, objective.equivariant
    z, p = [], []
    for branch, part in zip(branches, (slice(0, CUT), slice(CUT, None)), strict=True):
        projection = branch.projector(online[..., part].flatten(0, 1))
        z.append(projection.unflatten(0, (2, -1)).detach())
        p.append(branch.predictor(projection).unflatten(0, (2, -1)))
    images = range(online.shape[1])
    invariant = -sum(cosine(p[0][v, i], z[0][1 - v, i]) for v in range(2) for i in images) / (2 * len(images))
    first, second = branches
    heads = (first.projector, second.projector), (first.predictor, second.predictor)
    return [invariant, orthogonality(p[1], z[1], reference), balance(*heads)]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("name", "expect", "views"), [("dino", of_dino, 4), ("simclr", of_simclr, 2), ("simsiam", of_simsiam, 2)]
)
def test_the_loss_and_its_gradient_follow_the_paper(name, expect, views, reference):
    objective = clever(name, reference=reference)
    online, target = features(views)
    expected = expect(objective, online, target, reference)
    found = loss_of(objective, online, target)
    total = expected[0] + 0.7 * expected[1] + 0.01 * expected[2]
    assert found.total.item() == pytest.approx(total.item(), rel=1e-10)
    assert found.terms["orthogonality"].item() == pytest.approx(expected[1].item(), rel=1e-10)
    weights = [online, *(p for p in objective.parameters() if p.requires_grad)]
    slopes = [torch.autograd.grad(loss, weights, allow_unused=True) for loss in (found.total, total)]
    for found_slope, slope in zip(*slopes, strict=True):
        assert (found_slope is None) == (slope is None)
        if slope is not None:
            assert (found_slope - slope).norm() <= 1e-9 * slope.norm() + 1e-12


def test_orthogonal_views_cost_nothing():
    axes = torch.eye(6)
    online = torch.stack([axes[:3], axes[3:]])  # view 0 of image i is axis i, view 1 is axis i + 3
    for reference in (False, True):
        assert overlap(online, online, reference=reference) == 0
        assert overlap(online, online.flip(0), reference=reference) == 1


def test_images_of_opposite_sign_cancel_in_the_released_form_alone():
    """Two images whose views have cosines 1 and -1: far from orthogonal, yet free of cost as released."""
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    online = torch.stack([first, first * torch.tensor([[1.0], [-1.0]])])
    assert overlap(online, online, reference=True) == 0
    assert overlap(online, online, reference=False) == 1


@pytest.mark.parametrize("name", ["dino", "simclr", "byol"])
def test_each_term_teaches_its_own_part(name):
    """The base is silent about the equivariant part; orthogonality, however heavy, about the invariant one."""
    slopes = {}
    for weight in (0.0, 1e6):
        objective = clever(name, weight=weight, head_norm=0.0)
        online, target = features(2)
        slopes[weight] = torch.autograd.grad(loss_of(objective, online, target).total, online)[0].split(
            [CUT, FEATURES - CUT], dim=-1
        )
    (base_alone, none), (base_still, heavy) = slopes.values()
    assert (none == 0).all()
    assert torch.equal(base_alone, base_still)
    assert base_alone.abs().max() > 0
    assert heavy.abs().max() > 0


def test_what_turns_in_care_is_the_equivariant_part():
    objective = build({"name": "care", "groups": 2, "base": {"name": "clever", "base": base("dino")}})
    images = torch.randn(4, 3, 8, 8)
    rest = objective.base.base.backbone(images)[:, CUT:]
    assert torch.allclose(objective.embed(images), objective.base.equivariant.embed(rest), atol=1e-6)


def test_parts_for_probes_are_shares_of_every_blocks_token():
    """The released code's cut of the four tokens together kept three of them whole."""
    settings = {"name": "clever", "base": base("dino") | {"local_crops": 0}}
    objective = build_objective(from_tree({"objective": settings, "model": VIT})).eval()
    with torch.no_grad():
        parts = objective.represent(torch.randn(3, 3, 32, 32))
    width, cut = 24, 19  # int(0.8 * 24)
    assert torch.equal(torch.cat([parts["invariant"], parts["equivariant"]], dim=1), parts["full"])
    tokens = [parts["last4"][:, width * block : width * (block + 1)] for block in range(4)]
    assert torch.equal(parts["last4_invariant"], torch.cat([token[:, :cut] for token in tokens], dim=1))
    assert torch.equal(parts["last4_equivariant"], torch.cat([token[:, cut:] for token in tokens], dim=1))


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"name": "clever", "base": base("dino"), "cut": 0.05}, r"objective\.cut 0\.05 leaves 0 of 10"),
        ({"name": "clever", "base": base("dino"), "cut": 1.0}, r"leaves 10 of 10"),
        ({"name": "clever", "base": {"name": "clever", "base": base("dino")}}, "the base of clever is 'clever'.*dino"),
        ({"name": "clever", "base": {"name": "care", "base": base("dino")}}, "the base of clever is 'care'.*around clever"),
        ({"name": "clever", "base": {"name": "dinno"}}, "Did you mean 'dino'"),
        ({"name": "care", "base": {"name": "clever", "base": {"name": "dinno"}}}, r"objective\.base\.base\.name is 'dinno'"),
        ({"name": "care", "base": {"name": "clever", "base": {"name": "dino", "outs": 3}}}, "'objective.base.base.outs'"),
        ({"name": "clever"}, r"objective\.base is missing"),
    ],
)
def test_mistakes_are_named(section, told):
    with pytest.raises(UserError, match=told):
        build(section)


SIZES = ("imagenet100_vit_tiny", "imagenet100_vit_small", "imagenet100_resnet18", "imagenet100_resnet50", "cifar10_small")
TWINS = {f"clever_{size}": f"dino_{size}" for size in SIZES} | {
    "ddcl_imagenet100": "simsiam_imagenet100",
    "clever_simsiam_cifar10_small": "simsiam_cifar10_small",
}


@pytest.mark.parametrize(("recipe", "twin"), TWINS.items())
def test_twins_differ_in_the_objective_alone(recipe, twin):
    clever, plain = (flatten(to_tree(load_run(name))) for name in (recipe, twin))
    differing = {key for key in clever.keys() | plain.keys() if clever.get(key) != plain.get(key)} - {"recipe", "out"}
    assert all(key.startswith("objective.") for key in differing)
    inside = {key.removeprefix("objective.base."): value for key, value in clever.items() if key.startswith("objective.base.")}
    assert inside == {key.removeprefix("objective."): value for key, value in plain.items() if key.startswith("objective.")}

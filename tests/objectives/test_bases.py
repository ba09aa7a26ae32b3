"""Base methods: losses against the papers' formulas, queue and teachers against plain loops; all of them train and resume."""

import copy
import inspect
import math
from collections import deque

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import normalize

from methods import BASES, base, batch_of, build, methods
from reference import losses
from trainer.data.views import Batch
from trainer.objectives.objective import Objective
from trainer.objectives.siamese import Outputs

STEPS, IMAGES = 30, 16
FORMULAS = [name for name in BASES if hasattr(losses, name)]
TEACHERS = [name for name, settings in BASES.items() if "momentum" in settings]


def value_and_gradient(loss, p: Tensor) -> tuple[Tensor, Tensor]:
    p = p.clone().requires_grad_()
    value = loss(p)
    return value.detach(), torch.autograd.grad(value, p)[0]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("images", "scale"), [(2, 1.0), (7, 0.3)])
def test_the_loss_and_its_gradient_follow_the_paper(name, images, scale):
    branch = build(base(name)).double().branch
    p, t = scale * torch.randn(2, 2, images, 6, dtype=torch.float64)
    formula, known = getattr(losses, name), vars(branch.settings)
    if name == "moco":
        branch.queue = known["queue"] = normalize(branch.queue, dim=-1)  # drawn in float32: unit-norm to 1e-7
    arguments = {key: known[key] for key in list(inspect.signature(formula).parameters)[2:]}
    expected, slope = value_and_gradient(lambda p: formula(p, t, **arguments), p)
    found, found_slope = value_and_gradient(lambda p: branch.loss(Outputs(p, t, normalize(p, dim=-1)))[0], p)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (found_slope - slope).norm() < 1e-10 * slope.norm()


@pytest.mark.parametrize("images", [4, 10, 16, 50])
def test_the_queue_holds_what_a_plain_deque_holds(images):
    """40 keys: batches that divide it, that wrap around its end, and one larger than it."""
    branch = build(base("moco")).branch
    plain = deque(branch.queue.tolist(), maxlen=40)
    for _ in range(7):
        features = torch.randn(2, images, 10)
        branch.loss(branch(features, features))
        plain.extend(key.tolist() for view in branch.target_projector(features) for key in normalize(view, dim=-1))
        branch.after_step(0.9)
        assert branch.queue.roll(-int(branch.oldest), 0).tolist() == list(plain)


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_are_the_moving_average_of_what_they_follow(name):
    """tau_k = 1 - (1 - tau) (cos(pi k / K) + 1) / 2 (Grill et al. 2020), here between 0.9 and 0.99."""
    objective = build(base(name)).double()
    followed = {"teacher.module": objective.backbone, "branch.target_projector.module": objective.branch.projector}
    expected = {f"{t}.{n}": p.detach().clone() for t, source in followed.items() for n, p in source.named_parameters()}
    for step in range(8):
        objective.before_step(step / 8, epoch=step)
        objective(batch(objective, step, torch.float64))
        with torch.no_grad():
            for parameter in objective.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        objective.after_step()
        momentum = 0.99 - (0.99 - 0.9) * (math.cos(math.pi * step / 8) + 1) / 2
        for teacher, source in followed.items():
            for n, p in source.named_parameters():
                expected[f"{teacher}.{n}"] = momentum * expected[f"{teacher}.{n}"] + (1 - momentum) * p.detach()
        for n, value in expected.items():
            assert torch.allclose(objective.get_parameter(n), value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("title", methods())
def test_all_that_trains_has_a_gradient_and_no_teacher_does(title):
    """DDP waits for ever for a parameter without a gradient: it runs without find_unused_parameters."""
    objective = build(methods()[title])
    objective.before_step(0.5, epoch=5)
    objective(batch(objective, 0)).total.backward()
    teachers = {n for n, _ in objective.named_parameters() if ".module." in n}
    assert {n for n, p in objective.named_parameters() if p.grad is None} == teachers
    assert bool(teachers) == any(name in title for name in TEACHERS)


@pytest.mark.parametrize("name", BASES)
def test_targets_carry_a_gradient_only_where_the_paper_lets_them(name):
    objective = build(base(name))
    features = torch.randn(2, 6, 10, requires_grad=True)
    free = objective.branch(features, features).target.requires_grad
    assert free == (name in ("simclr", "barlow", "vicreg"))


def batch(objective: Objective, step: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Noisy views of the same few images."""
    views = {}
    for spec in objective.views():
        generator = torch.Generator().manual_seed(spec.size)
        images = torch.randn(IMAGES, 3, spec.size, spec.size, generator=generator) + torch.randn(
            IMAGES, 3, 1, 1, generator=generator
        )
        noise = torch.randn(spec.count, *images.shape, generator=generator.manual_seed(step))
        views[spec.name] = (images + 0.3 * noise).to(dtype)
    return batch_of(views)


def train(objective: Objective, optimiser: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    values = []
    for step in range(first, last):
        objective.before_step(step / STEPS, epoch=step / 10)
        torch.manual_seed(step)
        loss = objective(batch(objective, step))
        loss.total.backward()
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step()
        values.append(loss.total.item())
    return values


def optimiser_of(objective: Objective) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)


@pytest.mark.parametrize("title", methods())
def test_every_method_trains_and_continues_from_a_checkpoint_to_the_same_bits(title):
    whole = build(methods()[title])
    optimiser = optimiser_of(whole)
    before = train(whole, optimiser, 0, STEPS // 2)
    weights = safetensors.torch.save(whole.state_dict())  # refuses tensors that share memory
    moments = copy.deepcopy(optimiser.state_dict())
    after = train(whole, optimiser, STEPS // 2, STEPS)
    assert sum(after[-5:]) < sum(before[5:10])  # by then queue and centre hold what the encoder makes, not what they began with

    resumed = build(methods()[title], seed=1)
    resumed.load_state_dict(safetensors.torch.load(weights))
    optimiser = optimiser_of(resumed)
    optimiser.load_state_dict(moments)
    assert train(resumed, optimiser, STEPS // 2, STEPS) == after
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name

"""Two ranks compute what one rank computes on the joint batch, and become what it becomes: every method, in float64."""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from methods import BASES, base, batch_of, build, methods, wrapped
from trainer.config import Engine, Run
from trainer.engine.ddp import DDPEngine
from trainer.engine.engine import place
from trainer.engine.world import World, local_rows
from trainer.objectives import barlow, dino, moco, simclr
from trainer.objectives.objective import Objective

RANKS, IMAGES = 2, 16
CARE = {"weight": 3.0, "groups": 4}
VARIANTS = {
    "care of simclr, reference scale": wrapped("care", base("simclr"), **CARE, reference_scale=True),
    "care of simclr, rotation term": wrapped("care", base("simclr"), **CARE, term="rotation"),
    "care of clever of moco": wrapped("care", wrapped("clever", base("moco")), **CARE),
    "care of clever of dino": wrapped("care", wrapped("clever", base("dino")), **CARE),
    "clever of dino, reference": wrapped("clever", base("dino"), reference=True),
    "clever of simsiam, reference": wrapped("clever", base("simsiam"), reference=True),
} | {f"care of {name}, separate views": wrapped("care", base(name), **CARE, views="separate") for name in BASES}
METHODS = methods() | VARIANTS


def views_of(objective: Objective) -> dict[str, Tensor]:
    """The second half is brighter and stronger than the first, so that the ranks' own batch statistics differ."""
    torch.manual_seed(1)
    views = {
        view.name: torch.randn(view.count, IMAGES, 3, view.size, view.size, dtype=torch.float64) for view in objective.views()
    }
    for view in views.values():
        view[:, IMAGES // 2 :] = 3 * view[:, IMAGES // 2 :] + 1
    return views


def one_step(section: dict, world: World, sync_batchnorm: bool = True) -> dict[str, Tensor]:
    """Loss and terms, gradients, and after the step every weight, statistic, teacher, queue and centre."""
    settings = Engine(kind="ddp", precision="fp32", channels_last=False, sync_batchnorm=sync_batchnorm)
    objective = place(build(section).double(), settings, world)
    trained = [p for p in objective.parameters() if p.requires_grad]
    engine = DDPEngine(Run(), objective, torch.optim.SGD(trained, lr=0.1), world)
    rows = local_rows(IMAGES // world.size)
    objective.before_step(0.3, epoch=5.0)
    loss = engine.forward(batch_of({name: view[:, rows] for name, view in views_of(objective).items()}))
    engine.backward(loss.total)
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    engine.step()
    objective.after_step()
    values = {name: world.mean(value.clone()) for name, value in {"loss": loss.total.detach(), **loss.terms}.items()}
    return gradients | objective.state_dict() | values


def on_one_rank(title: str) -> dict[str, Tensor]:
    return one_step(METHODS[title], World(0, 1, 0, 1, torch.device("cpu")))


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=wait)
    world = World(rank, RANKS, rank, 1, torch.device("cpu"))
    found = {title: one_step(section, world) for title, section in METHODS.items()}
    found["own batch statistics"] = one_step(METHODS["simclr"], world, sync_batchnorm=False)
    simclr.gather_rows, simclr.local_rows = (lambda x: x), (lambda rows: slice(None))
    found["own negatives"] = one_step(METHODS["simclr"], world)
    moco.gather_views = barlow.gather_views = lambda views: views
    found["own queue"] = one_step(METHODS["moco"], world)
    dino.gather_rows = lambda rows: rows
    found["own centre"] = one_step(METHODS["dino"], world)
    found["own correlation"] = one_step(METHODS["barlow"], world)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        mp.spawn(rank_main, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def greatest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all tensors, relative to the largest entry of each."""
    assert found.keys() == expected.keys()
    pairs = [(found[key].double(), expected[key].double()) for key in expected]
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in pairs)


@pytest.mark.parametrize("title", METHODS)
def test_two_ranks_compute_and_become_what_one_does(title, on_two_ranks):
    expected = on_one_rank(title)
    for rank in on_two_ranks:
        assert greatest_difference(rank[title], expected) < 1e-10


SHORTCUTS = {
    "own negatives": "simclr",
    "own batch statistics": "simclr",
    "own queue": "moco",
    "own centre": "dino",
    "own correlation": "barlow",
}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_comparison_sees_a_rank_that_keeps_to_itself(shortcut, on_two_ranks):
    expected = on_one_rank(SHORTCUTS[shortcut])
    assert greatest_difference(on_two_ranks[0][shortcut], expected) > 0.01

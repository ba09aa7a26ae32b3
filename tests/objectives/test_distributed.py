"""Two ranks compute what one rank computes on the joint batch: losses, gradients and batch statistics, in float64."""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from trainer.config import Augmentation, Engine, Run
from trainer.data.views import Batch
from trainer.engine.ddp import DDPEngine
from trainer.engine.engine import place
from trainer.engine.world import World, local_rows
from trainer.objectives import simclr
from trainer.objectives.objective import Objective, registry

RANKS, IMAGES, SIZE = 2, 16, 8
BASE = {"temperature": 0.3, "hidden": 12, "dim": 6}
CARE = {"weight": 3.0, "groups": 4}
OBJECTIVES = {
    "simclr": ("simclr", {}),
    "care, shared views": ("care", CARE | {"views": "shared"}),
    "care, separate views": ("care", CARE | {"views": "separate"}),
    "care, reference scale": ("care", CARE | {"views": "shared", "reference_scale": True}),
    "care, rotation term": ("care", CARE | {"views": "shared", "term": "rotation"}),
}


def build(name: str, settings: dict) -> Objective:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8, momentum=0.3), nn.GELU(), nn.Conv2d(8, 10, 3), nn.Flatten()
    )
    backbone.num_features = 10
    base = simclr.SimCLR.Settings(**BASE)
    cls = registry()[name]
    return cls(backbone, base if name == "simclr" else cls.Settings(base=base, **settings), Augmentation(), SIZE).double()


def joint_batch() -> dict[str, Tensor]:
    """The second half is brighter and stronger than the first, so that the ranks' own batch statistics differ."""
    torch.manual_seed(1)
    views = {name: torch.randn(2, IMAGES, 3, SIZE, SIZE, dtype=torch.float64) for name in ("base", "paired")}
    for view in views.values():
        view[:, IMAGES // 2 :] = 3 * view[:, IMAGES // 2 :] + 1
    return views


def facts(objective: Objective, loss) -> dict[str, Tensor]:
    gradients = {f"gradient of {name}": p.grad for name, p in objective.named_parameters()}
    statistics = {f"buffer {name}": b.double() for name, b in objective.named_buffers()}
    return gradients | statistics | {"loss": loss.total.detach()} | loss.terms


def on_one_rank(name: str, settings: dict) -> dict[str, Tensor]:
    objective = build(name, settings)
    loss = objective(batch_of(joint_batch()))
    loss.total.backward()
    return facts(objective, loss)


def on_this_rank(name: str, settings: dict, world: World, sync_batchnorm: bool = True) -> dict[str, Tensor]:
    engine_settings = Engine(kind="ddp", precision="fp32", channels_last=False, sync_batchnorm=sync_batchnorm)
    objective = place(build(name, settings), engine_settings, world)
    engine = DDPEngine(Run(), objective, torch.optim.SGD(objective.parameters(), lr=1), world)
    rows = local_rows(IMAGES // RANKS)
    loss = engine.forward(batch_of({name: view[:, rows] for name, view in joint_batch().items()}))
    engine.backward(loss.total)
    found = facts(objective, loss)
    for term in ("loss", *loss.terms):
        found[term] = world.mean(found[term].clone())
    return found


def batch_of(views: dict[str, Tensor]) -> Batch:
    images = views["base"].shape[1]
    return Batch(views, torch.arange(images), torch.full((images,), -1))


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=wait)
    world = World(rank, RANKS, rank, 1, torch.device("cpu"))
    found = {title: on_this_rank(*objective, world) for title, objective in OBJECTIVES.items()}
    found["own batch statistics"] = on_this_rank(*OBJECTIVES["simclr"], world, sync_batchnorm=False)
    simclr.gather_rows, simclr.local_rows = (lambda x: x), (lambda rows: slice(None))
    found["own negatives"] = on_this_rank(*OBJECTIVES["simclr"], world)
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
    """Of all gradients, buffers and losses, relative to the largest entry of each."""
    assert found.keys() == expected.keys()
    return max(
        ((found[key] - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-3)).item() for key in expected
    )


@pytest.mark.parametrize("title", OBJECTIVES)
def test_two_ranks_have_the_losses_gradients_and_statistics_of_one(title, on_two_ranks):
    expected = on_one_rank(*OBJECTIVES[title])
    for rank in on_two_ranks:
        assert greatest_difference(rank[title], expected) < 1e-10


@pytest.mark.parametrize("shortcut", ["own negatives", "own batch statistics"])
def test_the_comparison_sees_a_rank_that_keeps_to_itself(shortcut, on_two_ranks):
    expected = on_one_rank(*OBJECTIVES["simclr"])
    assert greatest_difference(on_two_ranks[0][shortcut], expected) > 0.01

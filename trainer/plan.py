"""What a run would do and cost, computed without touching anything: `--dry_run`."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainer.config import Run, remarks, to_tree
from trainer.data.loader import rank_batch_size
from trainer.data.shards import ShardFolder
from trainer.data.views import Batch
from trainer.engine.world import World, check_nodes, look_around
from trainer.errors import UserError
from trainer.objectives.objective import Objective, build_objective
from trainer.objectives.siamese import Branch

STATES = {"adam": 2, "adamw": 2, "sgd": 1, "lars": 1}  # tensors of the weights' size that an optimiser keeps


@dataclass(frozen=True)
class Cost:
    """What one rank holds and sends.

    Args:
        parameters: weights that train, heads included.
        frozen: numbers held beside them: teachers, queues, statistics.
        encoded: images, small crops among them, that pass the encoder in one step, over all ranks.
        memory_bytes: weights, gradients, optimiser and activations on one rank, estimated.
        sent_bytes: gradients and embeddings that one rank sends in one step, ring collectives assumed.
    """

    parameters: int
    frozen: int
    encoded: int
    memory_bytes: int
    sent_bytes: int


def estimate(run: Run, ranks: int) -> Cost:
    """Price a step on the meta device: no memory is taken and no weight drawn.

    Activations are what autograd keeps of the step for the backward pass, in equal shares of the ranks: compilation and
    fused attention keep less, allocators, workspaces and losses that every rank computes whole (Barlow Twins) more. Sent are
    gradients and gathered embeddings; what little else travels (statistics of SyncBN, DINO's centre) is left out.
    """
    with torch.device("meta"):
        objective = build_objective(run)
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(tensor.numel() for tensor in objective.state_dict().values()) - parameters
    rank_batch_size(run.data.batch_size, ranks, objective.views())
    views = sum(view.count for view in objective.views())
    shards = ranks if run.engine.zero_stage else 1
    gradients = ranks if run.engine.zero_stage == 2 else 1
    state = 4 * parameters * (1 + 1 / gradients + STATES[run.optimiser.name] / shards) + (
        4 * parameters / shards if shards > 1 else 0
    )
    state += 4 * frozen
    ring = (ranks - 1) / ranks
    gathers = next((part.gathers for part in objective.modules() if isinstance(part, Branch)), 0)  # the base's comes first
    embeddings = gathers * 2 * run.data.batch_size * _embedding_dim(objective, run.data.size) * 4
    sent = ring * (2 * 4 * parameters + embeddings)  # an all-reduce of the gradients sends everything twice
    memory = int(state + _activations(objective, run) / ranks)
    return Cost(parameters, frozen, run.data.batch_size * views, memory, int(sent))


def print_plan(run: Run, nodes: int | None) -> None:
    """Print settings, world, length and cost of a run."""
    world = look_around()
    check_nodes(world, nodes)
    cost = estimate(run, world.size)
    if world.rank:
        return
    console = Console()
    settings = yaml.safe_dump(to_tree(run), sort_keys=False, default_flow_style=None, width=120)
    console.print(settings, highlight=False, soft_wrap=True)
    table = Table(show_header=False, title=f"{run.recipe}: what it would do", title_justify="left")
    for name, value in [*_length(run, world), *_cost(cost), *(("note", remark) for remark in remarks(run))]:
        table.add_row(name, value)
    console.print(table)


def _length(run: Run, world: World) -> list[tuple[str, str]]:
    rows = [("world", f"{world.size} rank(s) on {world.nodes} node(s), {world.device.type}")]
    try:
        shards = ShardFolder.open(Path(run.data.shards) / "train")
    except UserError as error:
        return [*rows, ("images", f"unknown: {error}")]
    epoch = shards.samples // world.size // (run.data.batch_size // world.size)
    steps = max(1, math.ceil(epoch * run.schedule.epochs)) if epoch else 0
    return [
        *rows,
        ("images", f"{shards.samples:,} in {len(shards.shards)} shards"),
        ("steps", f"{steps:,} ({epoch:,} an epoch, {run.schedule.epochs:g} epochs)"),
        ("images seen", f"{steps * run.data.batch_size:,}"),
    ]


def _cost(cost: Cost) -> list[tuple[str, str]]:
    return [
        ("parameters", f"{cost.parameters:,}, and {cost.frozen:,} numbers that do not train"),
        ("images encoded a step", f"{cost.encoded:,}"),
        ("memory of a rank", f"{cost.memory_bytes / 2**30:.2f} GiB, estimated"),
        ("sent by a rank a step", f"{cost.sent_bytes / 2**20:.1f} MiB"),
    ]


def _activations(objective: Objective, run: Run) -> int:
    """Bytes that a forward pass of the joint batch keeps for its backward pass; the encoder's in its own precision."""
    known = {tensor.untyped_storage()._cdata for tensor in objective.state_dict().values()}  # weights are counted elsewhere
    kept: list[Tensor] = []  # held, so that no other tensor takes the place of one that was counted
    total, width = 0.0, 1.0

    def enter(*_: object) -> None:
        nonlocal width
        width = 0.5 if run.engine.precision == "bf16" else 1.0

    def leave(*_: object) -> None:
        nonlocal width
        width = 1.0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            kept.append(tensor)
            total += storage.nbytes() * width
        return tensor

    for encoder in (encoder for part in objective.modules() if isinstance(part, Objective) for encoder in part.encoders()):
        encoder.register_forward_pre_hook(enter)
        encoder.register_forward_hook(leave)
    size = run.data.batch_size
    views = {v.name: torch.empty(v.count, size, 3, v.size, v.size, device="meta") for v in objective.views()}
    rows = torch.empty(size, dtype=torch.long, device="meta")
    objective.before_step(0.0, 0.0)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(Batch(views, rows, rows))
    return int(total)


def _embedding_dim(objective: Objective, size: int) -> int:
    """Of two images: a BatchNorm in training mode needs more than one."""
    with torch.no_grad():
        return objective.embed(torch.empty(2, 3, size, size, device="meta")).shape[1]

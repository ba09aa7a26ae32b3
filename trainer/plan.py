"""What a run would do and cost, computed without touching anything: `--dry_run`."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from trainer.config import Run, to_tree
from trainer.data.loader import rank_batch_size
from trainer.data.shards import ShardFolder
from trainer.engine.world import World, check_nodes, look_around
from trainer.errors import UserError
from trainer.objectives.objective import Objective, build_objective

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

    Activations are the outputs of all leaf modules, kept for the backward pass, in the encoder's precision: compilation
    and fused kernels need less, allocators and workspaces more.
    """
    with torch.device("meta"):
        objective = build_objective(run)
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(tensor.numel() for tensor in objective.state_dict().values()) - parameters
    rows = rank_batch_size(run.data.batch_size, ranks, objective.views())
    views = sum(view.count for view in objective.views())
    whole = sum(view.count * (view.size / run.data.size) ** 2 for view in objective.views())  # a small crop is part of a view
    activations = _activations(objective, run.data.size) * rows * whole
    width = 2 if run.engine.precision == "bf16" else 4
    shards = ranks if run.engine.zero_stage else 1
    gradients = ranks if run.engine.zero_stage == 2 else 1
    state = 4 * parameters * (1 + 1 / gradients + STATES[run.optimiser.name] / shards) + (
        4 * parameters / shards if shards > 1 else 0
    )
    state += 4 * frozen
    ring = (ranks - 1) / ranks
    embeddings = 2 * run.data.batch_size * _embedding_dim(objective, run.data.size) * 4
    # An all-reduce sends everything twice; gathered embeddings go once forward, and their gradients are all-reduced.
    sent = ring * (2 * 4 * parameters + 3 * embeddings)
    return Cost(parameters, frozen, run.data.batch_size * views, int(state + activations * width), int(sent))


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
    for name, value in [*_length(run, world), *_cost(cost)]:
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


def _activations(objective: Objective, size: int) -> int:
    """Numbers that the leaf modules of the whole objective put out for one image."""
    total = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor) and not list(module.children()):
            total += output.numel()

    hooks = [module.register_forward_hook(count) for module in objective.modules()]
    _embed_two(objective, size)
    for hook in hooks:
        hook.remove()
    return total // 2


def _embedding_dim(objective: Objective, size: int) -> int:
    return _embed_two(objective, size).shape[1]


def _embed_two(objective: Objective, size: int) -> torch.Tensor:
    """Two images: a BatchNorm in training mode needs more than one."""
    with torch.no_grad():
        return objective.embed(torch.empty(2, 3, size, size, device="meta"))

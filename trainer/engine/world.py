"""Who takes part in a run: ranks, nodes and devices, and the collectives that objectives need."""

import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One rank's place in the run.

    Args:
        rank: of all ranks, from 0.
        size: number of ranks.
        local_rank: of the ranks on this node, from 0.
        nodes: number of machines.
        device: where this rank computes.
    """

    rank: int
    size: int
    local_rank: int
    nodes: int
    device: torch.device

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def any(self, flag: bool) -> bool:
        """Whether any rank raises its flag; every rank must ask."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a tensor on this rank's device; one that is not finite anywhere is so everywhere."""
        if self.size == 1:
            return values
        dist.all_reduce(values)
        return values / self.size

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on all ranks; a UserError there is raised on all, so that none waits in vain."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = work()
            except UserError as error:
                answer[1] = error
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result


def look_around() -> World:
    """The world that the launcher (deepspeed, torchrun, or none) describes in the environment."""
    rank, size, local_rank = (int(os.environ.get(*key)) for key in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    for key in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if "WORLD_SIZE" not in os.environ and int(os.environ.get(key, "1")) > 1:
            found = f"{key} is {os.environ[key]}, but WORLD_SIZE is not set: every task would be a run of its own"
            raise UserError(found, "one launcher for all ranks", "Use launch/slurm.sh, deepspeed or torchrun.")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    nodes = int(os.environ.get("CROSS_SIZE") or os.environ.get("GROUP_WORLD_SIZE") or max(1, size // local_size))
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return World(rank, size, local_rank, nodes, torch.device("cuda", local_rank) if cuda else torch.device("cpu"))


def check_nodes(world: World, expected: int | None) -> None:
    """Hold the launcher to the `--nodes` flag; None promises nothing.

    Raises:
        UserError: a world of another size.
    """
    if expected is not None and expected != world.nodes:
        raise UserError(
            f"--nodes {expected} was promised, but the launcher started {world.nodes} node(s) with {world.size} rank(s)",
            f"{expected} node(s)",
            "Name the hosts: deepspeed --hostfile HOSTS launch/train.py --nodes N, torchrun --nnodes N, or launch/slurm.sh.",
        )


def join(world: World, *, expected_nodes: int | None, timeout_minutes: float) -> None:
    """Check the promised number of nodes and connect the ranks.

    Args:
        expected_nodes: the `--nodes` flag; None promises nothing.
        timeout_minutes: longest wait for another rank, here and in every later collective.

    Raises:
        UserError: a world of another size than promised, fewer GPUs than ranks, or ranks that did not arrive.
    """
    check_nodes(world, expected_nodes)
    if world.device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            found = f"local rank {world.local_rank} finds {torch.cuda.device_count()} GPU(s)"
            raise UserError(found, "one GPU per rank", "Start fewer ranks.")
        torch.cuda.set_device(world.device)
    if dist.is_initialized():
        return
    wait = datetime.timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    store = dist.HashStore() if world.size == 1 else None  # alone: no port is opened
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=wait, store=store)
    except (dist.DistError, RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {world.rank} of {world.size} met nobody at {address} ({str(error).splitlines()[0]})",
            f"all ranks within {timeout_minutes:g} minutes",
            "Check that MASTER_ADDR can be reached from every node; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.",
        ) from error


def leave() -> None:
    """Disconnect; after an error without waiting for the others."""
    if dist.is_initialized() and sys.exc_info()[0] is None:
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rows(rows: int) -> slice:
    """The rows of the joint batch that this rank holds, where every rank holds `rows`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(rank * rows, (rank + 1) * rows)


def gather_rows(x: Tensor) -> Tensor:
    """Stack the rows of all ranks, [B, ...] -> [world * B, ...], with gradients to every rank's own rows."""
    return x if world_size() == 1 else _GatherRows.apply(x)


class _GatherRows(torch.autograd.Function):
    """A row is used by the losses of all ranks, so its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        everyone = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(everyone, x.contiguous())
        ctx.rows = local_rows(len(x))
        return everyone

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.rows]

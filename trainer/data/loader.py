"""Batches for one rank: an endless, shuffled, resumable stream for training, or one pass in order for evaluation."""

import hashlib
import io
import json
import re
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data.augment import draw_view
from trainer.data.colour import colour
from trainer.data.shards import ShardFolder, read_index
from trainer.data.views import Batch, ViewSpec
from trainer.data.warp import warp
from trainer.errors import UserError

FORMAT = 1
SEARCH_S = 60.0  # longest search for the damage after a failed read


class Loader:
    """Iterates over a split.

    Shuffled, it never ends: every `steps_per_epoch` steps are one pass. The samples are dealt anew to the ranks in each
    epoch, the tars come in a new order (the same on all ranks), and each rank draws from a buffer of `shuffle_buffer` samples
    that it keeps full. So neighbours of a tar stay within a few buffer lengths of each other: a buffer as large as the
    rank's part is a full shuffle, a smaller one relies on the images having been shuffled into the tars, as make_shards
    does. An epoch leaves out what does not fill a batch on every rank, other images each time.

    In order, it is one pass over every sample: rank r has a range of them, and a partial last batch. Ranks may have
    different numbers of batches, and none.

    Args:
        folder: the split.
        views: what to make of every image.
        batch_size: images per step on this rank.
        seed: of the draws and of the order.
        rank, world_size: which part of each global batch is ours.
        device: where the views are made and returned.
        shuffle: training or evaluation, see above.
        threads: DALI's worker threads. They may change from run to run.
        mean, std: of the channels, of 1.
        shuffle_buffer: samples.
        state: of an equal loader, to go on from.

    Attributes:
        steps_per_epoch: batches of one pass; equal on all ranks when shuffled.
        wait_s: seconds that the last `next` took.

    Raises:
        UserError: too few samples, a damaged shard, a state of another loader.
    """

    def __init__(
        self,
        folder: ShardFolder,
        views: Sequence[ViewSpec],
        *,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        shuffle: bool = True,
        threads: int = 2,
        shuffle_buffer: int = 4096,
        state: bytes | None = None,
    ) -> None:
        self.folder, self.views, self.batch_size, self.seed = folder, tuple(views), batch_size, seed
        self.mean, self.std = mean, std
        self.rank, self.world_size, self.shuffle, self.device = rank, world_size, shuffle, torch.device(device)
        n = folder.samples
        self._parts = max(1, min(world_size, n))  # DALI has no ranks without a sample
        largest = -(-n // self._parts)
        self._samples = (rank + 1) * n // self._parts - rank * n // self._parts if rank < self._parts else 0
        self._iterations = -(-largest // batch_size)  # of DALI's epoch: it pads every rank to this
        self.steps_per_epoch = n // world_size // batch_size if shuffle else -(-self._samples // batch_size)
        if n == 0 or (shuffle and not self.steps_per_epoch):
            batch = f"one batch, {batch_size} on each of {world_size} ranks"
            raise UserError(f"{folder.path} holds {n} samples", f"at least {batch}", "Lower data.batch_size or add images.")
        self.wait_s = 0.0
        self._iteration = 0  # batches taken from DALI
        self._drawn: dict[int, dict[str, dict[str, np.ndarray]]] = {}  # by iteration, of the batches under way
        self._buffer = min(shuffle_buffer, largest) if shuffle else 0
        checkpoint = None if state is None else self._read_state(state)
        self._source: Any = self._start(threads, checkpoint) if self.steps_per_epoch else None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        step = self._iteration % self._iterations
        rows = self.batch_size
        if not self.shuffle:
            if self._iteration == self.steps_per_epoch:
                raise StopIteration
            rows = min(rows, self._samples - step * rows)
        elif step == self.steps_per_epoch:
            self._take()  # the batch that not every rank could fill
        with _one_thread():
            outputs, draws = self._take()
            batch = self._batch(outputs, draws, rows)
        self.wait_s = time.perf_counter() - start
        return batch

    def state(self) -> bytes:
        """Where a shuffled stream stands, a few kB: a line of JSON, then DALI's checkpoint."""
        header = {"format": FORMAT, "iteration": self._iteration, "of": self._identity()}
        return json.dumps(header).encode() + b"\n" + self._source.checkpoints()[0]

    def _read_state(self, state: bytes) -> bytes:
        """Set the iteration; return DALI's checkpoint."""
        line, _, checkpoint = state.partition(b"\n")
        try:
            header = json.loads(line)
            then, self._iteration = dict(header["of"]), int(header["iteration"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "the loader's state is unreadable", f"what format {FORMAT} wrote", "Use an older checkpoint."
            ) from error
        for key, now in self._identity().items():
            if then.get(key) != now:
                raise UserError(
                    f"the checkpoint's data had {key} {then.get(key)}",
                    f"{now}, as now",
                    "Continue with the settings it began with.",
                )
        return checkpoint

    def _start(self, threads: int, checkpoint: bytes | None) -> Any:
        """DALI's iterator over endless epochs, already fetching the first batch."""
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        from trainer.data import pipeline

        outputs = [str(i) for i in range(sum(view.count for view in self.views))]
        draw = weakref.WeakMethod(self._arguments)  # in a cycle, DALI's threads and memory would outlive the loader
        with self._damage_named():
            graph = pipeline.build(
                self.folder,
                self.views,
                lambda iteration: draw()(iteration),  # type: ignore[misc]
                batch_size=self.batch_size,
                rank=self.rank,
                world_size=self._parts,
                device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
                threads=threads,
                seed=self.seed,
                shuffle_buffer=self._buffer,
                checkpoint=checkpoint,
            )
            return DALIGenericIterator([graph], [*outputs, "label", "index"], size=-1)

    def _arguments(self, iteration: int) -> list[np.ndarray]:
        """What DALI's callback returns for its iteration, which counts on over epochs and checkpoints."""
        from trainer.data import pipeline

        epoch, step = divmod(iteration, self._iterations)
        self._drawn[iteration] = {
            view.name: draw_view(
                view,
                seed=self.seed,
                step=epoch * self.steps_per_epoch + step,
                rank=self.rank,
                batch_size=self.batch_size,
                world_size=self.world_size,
            )
            for view in self.views
        }
        return pipeline.to_arguments(self.views, self._drawn[iteration], self.folder.image_shape)

    def _take(self) -> tuple[dict[str, Tensor], dict[str, dict[str, np.ndarray]]]:
        """The next outputs of DALI and the draws they were made with."""
        with self._damage_named():
            outputs = next(self._source)[0]
        draws = self._drawn.pop(self._iteration, {})
        self._iteration += 1
        return outputs, draws

    def _batch(self, outputs: dict[str, Tensor], draws: dict[str, dict[str, np.ndarray]], rows: int) -> Batch:
        """The first `rows` images of DALI's outputs."""
        copies = iter(outputs[str(i)][:rows] for i in range(len(outputs) - 2))
        draws = {view: {name: value[:, :rows] for name, value in drawn.items()} for view, drawn in draws.items()}
        views = {}
        for view in self.views:
            drawn = draws.get(view.name, {})
            pixels = torch.cat(
                [
                    warp(next(copies), {name: value[copy] for name, value in drawn.items()}, view.of(copy), view.size)
                    for copy in range(view.count)
                ]
            )
            drawn = {name: value.reshape(len(pixels), *value.shape[2:]) for name, value in drawn.items()}
            views[view.name] = colour(pixels, drawn, self.mean, self.std).unflatten(0, (view.count, rows))
        return Batch(
            views=views,
            index=_integers(outputs["index"])[:rows].to(self.device),
            label=_integers(outputs["label"])[:rows].to(self.device),
            draws=draws,
        )

    def _identity(self) -> dict[str, Any]:
        """What a state belongs to: all that decides the stream, but for the draws' distribution."""
        shards = "".join(shard.sha256 for shard in self.folder.shards)
        return {
            "shards": hashlib.sha256(shards.encode()).hexdigest()[:16],
            "image_shape": self.folder.image_shape and list(self.folder.image_shape),  # which of two graphs
            "batch_size": self.batch_size,
            "rank": self.rank,
            "world_size": self.world_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "views": [[view.name, view.count, view.size] for view in self.views],
            "shuffle_buffer": self._buffer,
            "device": self.device.type,
        }

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        """Turn DALI's failure into an error that names the shard; leave it as it is where no shard is at fault."""
        try:
            yield
        except RuntimeError as error:
            damage = _named_in(str(error), self.folder) or _first_damage(self.folder)
            if damage is None:
                raise
            check = f"Run `python data_prep/check_shards.py {self.folder.path}` and make the shards it names again."
            raise UserError(f"{damage} is damaged", "shards that can be read to the end", check) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch's own threads would only wait for one another here: DALI's threads have the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rank_batch_size(batch_size: int, world_size: int, views: Sequence[ViewSpec]) -> int:
    """Images per rank, where ranks hold whole groups.

    Raises:
        UserError: the batch is not divisible by the ranks or the groups, or the groups by the ranks.
    """
    fix = "Change data.batch_size or {}."
    if batch_size % world_size:
        raise UserError(
            f"data.batch_size is {batch_size}", f"a multiple of the {world_size} ranks", fix.format("the number of ranks")
        )
    for groups in {view.groups for view in views if view.shared_by == "group"}:
        if groups < 1 or batch_size % groups or batch_size < 2 * groups:
            raise UserError(
                f"data.batch_size {batch_size} with objective.groups {groups}",
                "a batch that is a multiple of the groups, two images or more in each",
                fix.format("objective.groups"),
            )
        if groups % world_size:
            raise UserError(
                f"objective.groups is {groups}", f"a multiple of the {world_size} ranks", "Change it: no group spans two ranks."
            )
    return batch_size // world_size


def _integers(ascii_digits: Tensor) -> Tensor:
    """The decimal numbers in the rows of uint8 [B, 8], int64 [B]."""
    text = np.ascontiguousarray(ascii_digits.numpy()).view("S8")[:, 0]
    return torch.from_numpy(text.astype(np.int64))


def _named_in(message: str, folder: ShardFolder) -> str | None:
    """The shard, and the sample if known, that DALI's message names."""
    for shard in folder.shards:
        if shard.name in message or shard.index_name in message:
            sample = re.search(rf"{re.escape(shard.name)}:\d+:(\S+)", message)
            return f"{folder.path / shard.name}{f' (sample {sample[1]})' if sample else ''}"
    return None


def _first_damage(folder: ShardFolder) -> str | None:
    """The first shard and sample that PIL cannot read, if it is found in time."""
    deadline = time.monotonic() + SEARCH_S
    for tar_path, index_path in zip(folder.tar_paths, folder.index_paths, strict=True):
        with open(tar_path, "rb") as tar:
            for number, sample in enumerate(read_index(Path(index_path))):
                offset, size = sample[folder.image_extension]
                tar.seek(offset)
                try:
                    Image.open(io.BytesIO(tar.read(size))).load()
                except (OSError, SyntaxError, ValueError):
                    return f"{tar_path} (image {number} of it)"
                if time.monotonic() > deadline:
                    return None
    return None

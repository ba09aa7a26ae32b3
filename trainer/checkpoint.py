"""Checkpoints: folders that appear whole, with a checksum for every file, or not at all.

A checkpoint `step-00000120/` holds model.safetensors, optimiser-RANK.pt, loader-RANK.bin, settings.json and, written
last, manifest.json. Random numbers need no state: they are functions of (seed, rank, step).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from trainer import __version__
from trainer.config import Run, flatten, from_tree, to_tree
from trainer.engine.engine import Engine
from trainer.engine.world import World
from trainer.errors import STORAGE, UserError
from trainer.objectives.objective import Objective, build_objective

MANIFEST, SETTINGS = "manifest.json", "settings.json"
_UNFINISHED = ".unfinished-"  # prefix of a folder being written or deleted


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: optimiser steps taken.
        best_step, best_knn: the checkpoint with the best kNN on the validation split, per cent.
    """

    step: int = 0
    best_step: int = -1
    best_knn: float = -1.0

    def note(self, knn: float) -> None:
        """Remember this step if it is the best so far."""
        if knn > self.best_knn:
            self.best_step, self.best_knn = self.step, knn


@dataclass
class Checkpoints:
    """The checkpoints of one run. Every rank calls every method; the folder is storage that all ranks share.

    Args:
        folder: of the checkpoints.
        run: the settings.
        world: who takes part.
        keep: newest checkpoints kept, besides the best.
    """

    folder: Path
    run: Run
    world: World
    keep: int
    saved: int = field(default=-1)

    def save(self, progress: Progress, objective: Objective, engine: Engine, loader: bytes) -> Path:
        """Write a checkpoint atomically, then delete those that are no longer kept.

        Raises:
            UserError: the disk is full or the folder cannot be written; older checkpoints are as they were.
        """
        final = self.folder / f"step-{progress.step:08d}"
        unfinished = self.folder / f"{_UNFINISHED}{final.name}"
        rank = self.world.rank
        if self.saved == progress.step:
            return final

        def begin() -> None:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

        def write() -> None:
            _write(unfinished / f"loader-{rank:05d}.bin", lambda path: path.write_bytes(loader))
            if rank == 0 or engine.sharded:
                _write(unfinished / f"optimiser-{rank:05d}.pt", lambda path: torch.save(engine.optimiser_state(), path))
            if rank == 0:
                state = {name: tensor.contiguous() for name, tensor in objective.state_dict().items()}
                _write(unfinished / "model.safetensors", lambda path: safetensors.torch.save_file(state, path))
                write_json(unfinished / "settings.json", to_tree(self.run))

        def finish() -> None:
            loaders = len(list(unfinished.glob("loader-*")))
            if loaders != self.world.size:
                raise OSError(f"{loaders} of {self.world.size} ranks' files are here: is the folder on shared storage?")
            files = {path.name: _describe(path) for path in sorted(unfinished.iterdir())}
            manifest = {"format": 1, "version": __version__, "world_size": self.world.size, **vars(progress), "files": files}
            write_json(unfinished / MANIFEST, manifest)
            _sync_folder(unfinished)
            shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one that the run was resumed behind
            unfinished.rename(final)
            _sync_folder(self.folder)

        self._together(begin, final, rank == 0)
        self._together(write, final)
        self._together(finish, final, rank == 0)
        self.saved = progress.step
        if rank == 0:
            self._retain(progress)
        return final

    def newest(self) -> Path | None:
        """The newest checkpoint whose checksums hold; damaged ones are named and passed over.

        Raises:
            UserError: there are checkpoints and all are damaged, or the newest is of another world size.
        """
        path = self.world.first(lambda: _newest_sound(self.folder))
        if path is not None:
            manifest = read_manifest(path)
            if manifest["world_size"] != self.world.size:
                found = f"{path} was saved by {manifest['world_size']} rank(s), this world has {self.world.size}"
                raise UserError(found, "the same number", f"Start {manifest['world_size']} ranks.")
            self.saved = manifest["step"]
        return path

    def load(self, path: Path, objective: Objective, engine: Engine) -> Progress:
        """Put weights and optimiser back as they were."""
        load_weights(path, objective)
        rank = self.world.rank if engine.sharded else 0
        state = torch.load(path / f"optimiser-{rank:05d}.pt", map_location="cpu", weights_only=True)
        engine.load_optimiser_state(state)
        manifest = read_manifest(path)
        return Progress(manifest["step"], manifest["best_step"], manifest["best_knn"])

    def loader_state(self, path: Path) -> bytes:
        """Where this rank's loader stood."""
        return (path / f"loader-{self.world.rank:05d}.bin").read_bytes()

    def clean(self) -> None:
        """Remove what a killed run was writing or deleting."""
        if self.world.rank == 0:
            for path in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _retain(self, progress: Progress) -> None:
        """Delete all but the newest and the best. Later ones are damaged: the run was resumed behind them."""
        now = f"step-{progress.step:08d}"
        paths = sorted(self.folder.glob("step-*"))
        good = [path for path in paths if path.name <= now]
        kept = {*good[-self.keep :], self.folder / f"step-{progress.best_step:08d}"}
        for path in paths:
            if path not in kept or path.name > now:
                doomed = self.folder / f"{_UNFINISHED}{path.name}"
                path.rename(doomed)  # a kill in the middle of deleting must not leave a checkpoint without some files
                shutil.rmtree(doomed, ignore_errors=True)

    def _together(self, work: Callable[[], Any], final: Path, mine: bool = True) -> None:
        """Do a part of saving on the ranks it concerns; if it fails on one, it fails on all and leaves nothing behind."""
        failure: Exception | None = None
        try:
            if mine:
                work()
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
            failure = error
        if not self.world.any(failure is not None):
            return
        if self.world.rank == 0:
            shutil.rmtree(self.folder / f"{_UNFINISHED}{final.name}", ignore_errors=True)
        raise UserError(
            f"checkpoint {final} cannot be written ({failure or 'see the other ranks'})",
            "a shared folder with enough free space",
            "Mend that and start the same command again: it continues from the checkpoint before.",
            code=STORAGE,
        ) from failure


def load_objective(path: Path | str) -> tuple[Objective, Run]:
    """Rebuild a trained objective, in evaluation mode on the CPU.

    Args:
        path: a checkpoint folder, or a run folder, whose newest sound checkpoint is taken.

    Raises:
        UserError: no checkpoint there, a damaged one, or weights of another model than its settings describe.
    """
    path = resolve(Path(path))
    run = from_tree(_read_json(path / SETTINGS))
    objective = build_objective(run)
    load_weights(path, objective)
    return objective.eval(), run


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path means."""
    if (path / MANIFEST).is_file():
        if damage := _damage(path):
            raise UserError(f"checkpoint {path} is damaged: {damage}", "the files that its manifest lists", "Use another.")
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (newest := _newest_sound(folder)):
            return newest
    raise UserError(f"no checkpoint in {path}", "a checkpoint or a run folder", "Train one: launch/train.py --recipe demo.")


def load_weights(path: Path, objective: Objective) -> None:
    """Load model.safetensors, every tensor or an error that names the first which does not fit."""
    state = safetensors.torch.load_file(path / "model.safetensors")
    own = objective.state_dict()
    wrong = [
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name].shape != state[name].shape
    ]
    if wrong:
        name = min(wrong)
        raise UserError(
            f"{path} holds another model: {len(wrong)} tensors do not fit, first {name} "
            f"({_shape(state, name)} in the file, {_shape(own, name)} in the model)",
            "weights of the model that its settings describe",
            "Use the settings it was trained with.",
        )
    objective.load_state_dict(state)


def check_settings(folder: Path, run: Run) -> None:
    """Refuse to continue a run under settings that would change its course.

    Raises:
        UserError: naming every setting that differs.
    """
    if not (folder / "metrics.jsonl").exists():
        return  # nothing began here
    before, now = (flatten(to_tree(each)) for each in (from_tree(_read_json(folder / SETTINGS)), run))
    free = tuple(f"{name}." for name in Run.free)
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and not f"{k}.".startswith(free)]
    if changed:
        listing = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in changed)
        raise UserError(
            f"{folder} holds a run with other settings: {listing}", "the same settings", "Give the new run a folder: --out DIR."
        )


def open_folder(folder: Path, run: Run, world: World) -> object:
    """Make the run's folder, lock it, and write the settings, the first thing that a run writes.

    Returns: the lock, held while the process lives and this is referred to.

    Raises:
        UserError: a folder that cannot be written, in use, or not on storage which all ranks share.
    """
    locks: list[object] = []
    world.first(lambda: locks.append(_lock(folder, run)))
    if not (folder / SETTINGS).exists():
        found = f"rank {world.rank} does not see {folder}"
        raise UserError(found, "a folder on storage that all nodes share", "Set --out to one.")
    return locks


def _lock(folder: Path, run: Run) -> object:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_json(folder / SETTINGS, to_tree(run))
    except BlockingIOError as error:
        found = f"another process trains in {folder}"
        raise UserError(found, "a folder of its own for each run", "Wait for it, or set --out.") from error
    except OSError as error:
        found = f"{folder} cannot be written ({error.strerror})"
        raise UserError(found, "a writable folder", "Set --out to one.") from error
    return lock


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint."""
    return _read_json(path / MANIFEST)


def _newest_sound(folder: Path) -> Path | None:
    paths = sorted(folder.glob("step-*"), reverse=True)
    for path in paths:
        if not (damage := _damage(path)):
            return path
        print(f"warning: checkpoint {path} is damaged ({damage}); falling back to the one before", file=sys.stderr, flush=True)
    if paths:
        found = f"all {len(paths)} checkpoints in {folder} are damaged"
        raise UserError(found, "a sound one", "Restore one, or give the run a new folder: --out DIR.")
    return None


def _damage(path: Path) -> str:
    try:
        files = read_manifest(path)["files"]
        for name, description in files.items():
            if _describe(path / name) != description:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write(path: Path, writer: Callable[[Path], Any]) -> None:
    writer(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    _write(unfinished, lambda p: p.write_text(json.dumps(value, indent=1)))
    unfinished.rename(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error})", "JSON that this program wrote", "Restore it or use another folder."
        ) from error
    return dict(value)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # some network file systems refuse to open folders
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _shape(state: dict[str, torch.Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "absent"

"""A folder of image files, whose classes are its folders."""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.sources.encoding import kind_of, majority, stored
from data_prep.sources.names import Names
from data_prep.sources.source import Bad, Images, Options, Sample, Source
from trainer.errors import UserError


class FileImages(Images):
    """Files under one folder.

    Args:
        root: the folder.
        names: paths relative to it.
        labels: int64 [N].
        extension: of the images to store; files of another kind are re-encoded, without loss but for jpg.
    """

    def __init__(self, root: Path, names: Names, labels: np.ndarray, extension: str) -> None:
        self.labels = labels
        self._root, self._names, self._extension = root, names, extension

    def read(self, numbers: np.ndarray) -> Iterator[Sample | Bad]:
        """Each is a whole file."""
        for number in numbers:
            path = self._root / self._names[number]
            try:
                kind = kind_of(path.name)
                if kind is None:
                    raise ValueError("not named as an image")
                data, shape = stored(path.read_bytes(), kind, self._extension)
                yield Sample(data, int(self.labels[number]), shape)
            except (OSError, ValueError) as error:
                yield Bad(int(number), self.describe(number), f"({getattr(error, 'strerror', None) or error})")

    def describe(self, number: int) -> str:
        """Where the image comes from."""
        return str(self._root / self._names[number])


def open_folder(options: Options) -> Source:
    """ROOT/train/CLASS/*, with ROOT/test or else ROOT/val as test; without train/, everything in ROOT is for training."""
    root = options.root
    train_root = root / "train" if (root / "train").is_dir() else root
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if train_root == root and tests:  # a split would be taken for a class
        raise UserError(f"{root} has {tests[0].name}/ and no train/", "train/CLASS/*.jpg beside it", "Correct --root.")
    digest, kinds, classes = hashlib.sha256(b"["), Counter[str | None](), dict[str, int]()
    pools = []
    for folder in (train_root, *tests[:1]):
        names, labels = Names(), array("q")
        digest.update(b", [" if pools else b"[")
        for name, size in _walk(folder):
            digest.update(f"{', ' if len(names) else ''}{(name, size)}".encode())
            names.append(name)
            kinds[kind_of(name)] += 1
            above = "" if options.unlabelled or "/" not in name else name.partition("/")[0]
            if above and pools and above not in classes:
                raise UserError(
                    f"{folder / above} has no namesake in {train_root}", "the classes of training", "Correct the folders."
                )
            labels.append(classes.setdefault(above, len(classes)) if above else -1)  # in order, as the walk is
        digest.update(b"]")
        if not pools and not names:
            raise UserError(f"no images in {train_root}", "train/CLASS/*.jpg or CLASS/*.jpg", "Correct --root.")
        pools.append((folder, names, np.array(labels, np.int64)))
    digest.update(b"], unlabelled" if options.unlabelled else b"]")
    extension = majority(kinds)
    train, test = (*(FileImages(*pool, extension) for pool in pools), None)[:2]
    return Source(train, test, list(classes) or None, extension, digest.hexdigest())


def _walk(root: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """Relative path and size of every file, a folder's files before its folders, sorted; hidden ones are left out."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(root / below) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(entry.name)
    for name in sorted(files):
        path = os.path.join(root, below, name)
        if os.path.isfile(path):
            yield below + name, os.path.getsize(path)
    for name in sorted(folders):
        yield from _walk(root, f"{below}{name}/")

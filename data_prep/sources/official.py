"""CIFAR-10, CIFAR-100 and STL-10: the official files, in the binary or the python layout, memory-mapped where that allows."""

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.sources.encoding import png
from data_prep.sources.source import Images, Options, Sample, Source
from trainer.errors import UserError


class ArrayImages(Images):
    """Images that lie in arrays, memory-mapped where the layout allows.

    Args:
        parts: uint8 [n, H, W, 3] each.
        labels: int64 [N] over all parts.
    """

    def __init__(self, parts: list[np.ndarray], labels: np.ndarray) -> None:
        self.labels = labels.astype(np.int64)
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def read(self, numbers: np.ndarray) -> Iterator[Sample]:
        """As PNG, which is lossless."""
        for number in numbers:
            part = int(np.searchsorted(self._ends, number, side="right"))
            image = self._parts[part][number - self._ends[part]]  # a negative row counts from the part's end
            yield Sample(png(image), int(self.labels[number]), image.shape[:2])

    def fingerprint(self) -> bytes:
        """Checksum of the labels and of every hundredth image: enough to tell another data set, without reading it all."""
        digest = hashlib.sha256(self.labels.tobytes())
        for part in self._parts:
            digest.update(np.ascontiguousarray(part[::100]).tobytes())
        return digest.digest()


def open_cifar10(options: Options) -> Source:
    """Ten classes."""
    names = [f"data_batch_{i}" for i in range(1, 6)]
    kind, folder = _find(
        options.root, "CIFAR-10", {"binary": "cifar-10-batches-bin/test_batch.bin", "python": "cifar-10-batches-py/test_batch"}
    )
    if kind == "binary":
        train, test = (_cifar_binary([folder / f"{n}.bin" for n in part], 1) for part in (names, ["test_batch"]))
        return _arrays(train, test, (folder / "batches.meta.txt").read_text().split())
    train, test = (_cifar_python([folder / n for n in part], "labels") for part in (names, ["test_batch"]))
    return _arrays(train, test, _load_pickle(folder / "batches.meta")["label_names"])


def open_cifar100(options: Options) -> Source:
    """A hundred fine classes."""
    kind, folder = _find(options.root, "CIFAR-100", {"binary": "cifar-100-binary/test.bin", "python": "cifar-100-python/test"})
    if kind == "binary":
        train, test = (_cifar_binary([folder / f"{part}.bin"], 2) for part in ("train", "test"))
        return _arrays(train, test, (folder / "fine_label_names.txt").read_text().split())
    train, test = (_cifar_python([folder / part], "fine_labels") for part in ("train", "test"))
    return _arrays(train, test, _load_pickle(folder / "meta")["fine_label_names"])


def open_stl10(options: Options) -> Source:
    """Training is the unlabelled images and the labelled ones after them. The files are column-major."""
    _, folder = _find(options.root, "STL-10", {"binary": "stl10_binary/train_X.bin"})
    part = {
        n: _map(folder / f"{n}_X.bin", np.dtype(("u1", (3, 96, 96)))).transpose(0, 3, 2, 1)
        for n in ("unlabeled", "train", "test")
    }
    label = {n: _map(folder / f"{n}_y.bin", np.dtype("u1")).astype(np.int64) - 1 for n in ("train", "test")}
    labels = np.concatenate([np.full(len(part["unlabeled"]), -1), label["train"]])
    train, test = ArrayImages([part["unlabeled"], part["train"]], labels), ArrayImages([part["test"]], label["test"])
    return _arrays(train, test, (folder / "class_names.txt").read_text().split())


def _arrays(train: ArrayImages, test: ArrayImages, classes: list[str]) -> Source:
    fingerprint = hashlib.sha256(train.fingerprint() + test.fingerprint()).hexdigest()
    return Source(train, test, classes, "png", fingerprint)


def _find(root: Path, title: str, layouts: dict[str, str]) -> tuple[str, Path]:
    """The first layout there is, in `root` or in the official folder below it."""
    for kind, probe in layouts.items():
        for path in (root / probe, root / Path(probe).name):
            if path.is_file():
                return kind, path.parent
    expected = " or ".join(str(Path(probe).parent) for probe in layouts.values())
    raise UserError(f"no {title} in {root}", expected, "Correct --root, or let --download fetch it.")


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size if path.is_file() else 0
    if size == 0 or size % dtype.itemsize:
        raise UserError(f"{path} has {size} bytes", f"a multiple of {dtype.itemsize}", "Unpack the official archive again.")
    return np.memmap(path, mode="r", dtype=dtype)


def _cifar_binary(paths: list[Path], label_bytes: int) -> ArrayImages:
    record = np.dtype([("label", "u1", (label_bytes,)), ("image", "u1", (3, 32, 32))])
    maps = [_map(path, record) for path in paths]
    labels = np.concatenate([records["label"][:, -1] for records in maps])  # CIFAR-100: coarse, then fine
    return ArrayImages([records["image"].transpose(0, 2, 3, 1) for records in maps], labels)


def _cifar_python(paths: list[Path], key: str) -> ArrayImages:
    batches = [_load_pickle(path) for path in paths]
    images = [np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches]
    return ArrayImages(images, np.concatenate([batch[key] for batch in batches]))


class _ArraysOnly(pickle.Unpickler):
    """A pickle may call anything; these official ones need numpy's array constructor alone."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype", "_frombuffer", "encode")

    def find_class(self, module: str, name: str) -> object:
        if name in self._ALLOWED and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _load_pickle(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read ({error})", "the official file", "Unpack the official archive again."
        ) from error


def download(name: str, root: Path) -> None:
    """Let torchvision fetch the official files into `root`."""
    from torchvision import datasets

    fetch = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    try:
        fetch(str(root), download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise UserError(
            f"{name} could not be downloaded ({error})", "a network", "Fetch it elsewhere and give its --root."
        ) from error

"""Where images come from: the official CIFAR and STL-10 files, a folder of images, or drawings. Reading gives checked samples.

Nothing is decoded until `read`, so that opening a source costs a list of paths or of memory maps.
"""

import hashlib
import io
import os
import pickle
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data_prep import synthetic
from trainer.errors import UserError

NAMES = ("cifar10", "cifar100", "stl10", "imagefolder", "synthetic")
DALI_DECODES = ("jpg", "png", "webp")  # these are stored as they are
KINDS = {  # MPO: photographs with a second picture inside, opened as JPEG
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tiff",
    "PPM": "ppm",
}
SUFFIXES = {"jpeg": "jpg", "tif": "tiff", "pgm": "ppm"} | {kind: kind for kind in KINDS.values()}
ENCODINGS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
}


@dataclass(frozen=True)
class Sample:
    """A good image: encoded, with its label (-1: none), the height and width as it is decoded, and its factors if known."""

    image: bytes
    label: int
    shape: tuple[int, int]
    factors: dict[str, float] | None = None


@dataclass(frozen=True)
class Bad:
    """An image that cannot be used: which, and why."""

    number: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class Images(Protocol):
    """Images numbered from 0, with `labels` int64 [N], -1 where there is none."""

    labels: np.ndarray

    def read(self, numbers: np.ndarray) -> Iterator[Sample | Bad]:
        """Decode and check these images, in this order."""
        ...


@dataclass(frozen=True)
class Source:
    """What `open_source` finds.

    Args:
        train: the official training images (validation is carved out of them).
        test: the official test images, None where there are none.
        classes: name of each label, None without labels.
        image_extension: what `read` gives: "png", "jpg" or "webp".
        fingerprint: tells this content from another, the same for every layout of the same content.
        factors: names of the known factors.
    """

    train: Images
    test: Images | None
    classes: list[str] | None
    image_extension: str
    fingerprint: str
    factors: list[str] | None = None


def open_source(name: str, root: str | None, seed: int, samples: int, size: int, download: bool) -> Source:
    """Open a source by name.

    Args:
        name: one of NAMES.
        root: folder of the source; none for "synthetic".
        seed, samples, size: of the synthetic images; `samples` for training, and a tenth more for the test.
        download: let torchvision fetch the official files into `root` first.

    Raises:
        UserError: unknown name, nothing of that kind in `root`, files of a wrong size.
    """
    if name not in NAMES:
        raise UserError(f"--source is {name!r}", f"one of {', '.join(NAMES)}", "Correct it.")
    if name == "synthetic":
        return _synthetic(seed, samples, size)
    if root is None or not (Path(root).is_dir() or download):
        raise UserError(f"--root is {root}", f"the folder of {name}", "Give the folder that holds the data.")
    if download:
        _download(name, root)
    return {"cifar10": _cifar10, "cifar100": _cifar100, "stl10": _stl10, "imagefolder": _imagefolder}[name](Path(root))


class SyntheticImages:
    """Drawn images (data_prep/synthetic.py)."""

    def __init__(self, seed: int, pool: int, samples: int, size: int) -> None:
        self.labels = np.arange(samples) % len(synthetic.CLASSES)
        self._about = (seed, pool, size)

    def read(self, numbers: np.ndarray) -> Iterator[Sample]:
        """Draw 64 at a time: numpy is then busy with pixels, not with calls."""
        seed, pool, size = self._about
        for begin in range(0, len(numbers), 64):
            chunk = numbers[begin : begin + 64]
            for number, image, factors in zip(chunk, *synthetic.draw(seed, pool, chunk, size), strict=True):
                named = dict(zip(synthetic.FACTORS, np.round(factors, 6).tolist(), strict=True))
                yield Sample(_png(image), int(self.labels[number]), (size, size), named)


class ArrayImages:
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
            yield Sample(_png(image), int(self.labels[number]), image.shape[:2])

    def fingerprint(self) -> bytes:
        """Checksum of the labels and of every hundredth image: enough to tell another data set, without reading it all."""
        digest = hashlib.sha256(self.labels.tobytes())
        for part in self._parts:
            digest.update(np.ascontiguousarray(part[::100]).tobytes())
        return digest.digest()


class FolderImages:
    """Files under one folder; the label is the first folder below it.

    Args:
        root: the folder.
        names: paths relative to it.
        labels: int64 [N].
        extension: of the images to store; files of another kind are re-encoded, without loss but for jpg.
    """

    def __init__(self, root: Path, names: list[str], labels: np.ndarray, extension: str) -> None:
        self.labels = labels
        self._root, self._names, self._extension = root, names, extension

    def read(self, numbers: np.ndarray) -> Iterator[Sample | Bad]:
        """Decode each file in full; DALI cannot skip a corrupt image."""
        for number in numbers:
            path = self._root / self._names[number]
            try:
                data, shape = self._load(path)
                yield Sample(data, int(self.labels[number]), shape)
            except (OSError, ValueError) as error:
                yield Bad(int(number), str(path), f"({error})")

    def _load(self, path: Path) -> tuple[bytes, tuple[int, int]]:
        kind = SUFFIXES.get(path.suffix.lower().lstrip("."))
        if kind is None:
            raise ValueError("not named as an image")
        data = path.read_bytes()
        image = decode(data, kind)
        return data if kind == self._extension else _encode(image, self._extension), _upright_shape(image)


def decode(data: bytes, kind: str) -> Image.Image:
    """Decode an image in full.

    Args:
        data: the encoded image.
        kind: what it must be, a value of KINDS.

    Raises:
        ValueError: it is empty, corrupt or of another kind; says which.
    """
    if not data:
        raise ValueError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; what matters is raised
            image = Image.open(io.BytesIO(data), formats=sorted(set(KINDS) - {"MPO"}))
            image.load()
    except UnidentifiedImageError:
        raise ValueError("not an image, or a corrupt one") from None
    except (OSError, ValueError, SyntaxError, IndexError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"corrupt: {error}") from None
    found = KINDS[image.format or ""]
    if found != kind:
        raise ValueError(f"wrong extension, it is {found}")
    return image


def _upright_shape(image: Image.Image) -> tuple[int, int]:
    """Height and width as DALI decodes it, which turns it by its metadata."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except (OSError, ValueError, SyntaxError, struct.error):  # unreadable metadata turn nothing
        turned = False
    return image.size if turned else (image.height, image.width)


def _png(image: np.ndarray) -> bytes:
    return _encode(Image.fromarray(np.ascontiguousarray(image)), "png")


def _encode(image: Image.Image, extension: str) -> bytes:
    """Upright RGB, as DALI decodes the original."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    with io.BytesIO() as file:
        ImageOps.exif_transpose(image).convert("RGB").save(file, **ENCODINGS[extension])
        return file.getvalue()


def _synthetic(seed: int, samples: int, size: int) -> Source:
    return Source(
        train=SyntheticImages(seed, 0, samples, size),
        test=SyntheticImages(seed, 1, samples // 10, size),
        classes=list(synthetic.CLASSES),
        image_extension="png",
        fingerprint=f"{samples} drawings of {size} pixels",
        factors=list(synthetic.FACTORS),
    )


def _arrays(train: ArrayImages, test: ArrayImages, classes: list[str]) -> Source:
    fingerprint = hashlib.sha256(train.fingerprint() + test.fingerprint()).hexdigest()
    return Source(train, test, classes, "png", fingerprint)


def _cifar10(root: Path) -> Source:
    names = [f"data_batch_{i}" for i in range(1, 6)]
    kind, folder = _find(
        root, "CIFAR-10", {"binary": "cifar-10-batches-bin/test_batch.bin", "python": "cifar-10-batches-py/test_batch"}
    )
    if kind == "binary":
        train, test = (_cifar_binary([folder / f"{n}.bin" for n in part], 1) for part in (names, ["test_batch"]))
        return _arrays(train, test, (folder / "batches.meta.txt").read_text().split())
    train, test = (_cifar_python([folder / n for n in part], "labels") for part in (names, ["test_batch"]))
    return _arrays(train, test, _load_pickle(folder / "batches.meta")["label_names"])


def _cifar100(root: Path) -> Source:
    kind, folder = _find(root, "CIFAR-100", {"binary": "cifar-100-binary/test.bin", "python": "cifar-100-python/test"})
    if kind == "binary":
        train, test = (_cifar_binary([folder / f"{part}.bin"], 2) for part in ("train", "test"))
        return _arrays(train, test, (folder / "fine_label_names.txt").read_text().split())
    train, test = (_cifar_python([folder / part], "fine_labels") for part in ("train", "test"))
    return _arrays(train, test, _load_pickle(folder / "meta")["fine_label_names"])


def _stl10(root: Path) -> Source:
    """Training is the unlabelled images and the labelled ones after them. The files are column-major."""
    _, folder = _find(root, "STL-10", {"binary": "stl10_binary/train_X.bin"})
    part = {
        n: _map(folder / f"{n}_X.bin", np.dtype(("u1", (3, 96, 96)))).transpose(0, 3, 2, 1)
        for n in ("unlabeled", "train", "test")
    }
    label = {n: _map(folder / f"{n}_y.bin", np.dtype("u1")).astype(np.int64) - 1 for n in ("train", "test")}
    labels = np.concatenate([np.full(len(part["unlabeled"]), -1), label["train"]])
    train, test = ArrayImages([part["unlabeled"], part["train"]], labels), ArrayImages([part["test"]], label["test"])
    return _arrays(train, test, (folder / "class_names.txt").read_text().split())


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


def _download(name: str, root: str) -> None:
    from torchvision import datasets

    fetch = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}.get(name)
    if fetch is None:
        raise UserError(f"--download with --source {name}", "cifar10, cifar100 or stl10", "Leave --download out.")
    try:
        fetch(root, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise UserError(
            f"{name} could not be downloaded ({error})", "a network", "Fetch it elsewhere and give its --root."
        ) from error


def _imagefolder(root: Path) -> Source:
    """ROOT/train/CLASS/*, with ROOT/test or else ROOT/val as test; without train/, everything in ROOT is for training."""
    train_root = root / "train" if (root / "train").is_dir() else root
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if train_root == root and tests:  # a split would be taken for a class
        raise UserError(f"{root} has {tests[0].name}/ and no train/", "train/CLASS/*.jpg beside it", "Correct --root.")
    test_root = tests[0] if tests else None
    listing = {folder: _walk(folder) for folder in (train_root, test_root) if folder}
    classes = sorted({_class_of(name) for name, _ in listing[train_root]} - {""})
    if not listing[train_root]:
        raise UserError(f"no images in {train_root}", "train/CLASS/*.jpg or CLASS/*.jpg", "Correct --root.")
    kinds = Counter(SUFFIXES.get(name.rpartition(".")[2].lower()) for files in listing.values() for name, _ in files)
    extension = max(DALI_DECODES, key=lambda kind: kinds[kind])
    if not kinds[extension]:
        extension = "png"

    def images(folder: Path) -> FolderImages:
        names = [name for name, _ in listing[folder]]
        number = {"": -1} | {name: i for i, name in enumerate(classes)}
        foreign = sorted({_class_of(name) for name in names} - set(number))
        if foreign:
            raise UserError(
                f"{folder / foreign[0]} has no namesake in {train_root}", "the classes of training", "Correct the folders."
            )
        return FolderImages(folder, names, np.array([number[_class_of(name)] for name in names], np.int64), extension)

    digest = hashlib.sha256(repr(list(listing.values())).encode()).hexdigest()
    return Source(images(train_root), images(test_root) if test_root else None, classes or None, extension, digest)


def _class_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _walk(root: Path) -> list[tuple[str, int]]:
    """Relative path and size of every file below, sorted; hidden ones are left out."""
    files = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                files.append((path.relative_to(root).as_posix(), path.stat().st_size))
    return files

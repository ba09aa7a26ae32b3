"""Encoded images: decoded in full to check them, kept as they are where DALI decodes them, else encoded anew."""

import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

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


def kind_of(name: str) -> str | None:
    """The kind of image that a file's name tells, a value of KINDS."""
    return SUFFIXES.get(name.rpartition(".")[2].lower())


def majority(kinds: Mapping[str | None, int]) -> str:
    """The extension to store: the most frequent kind that DALI decodes, png if none does."""
    most = max(DALI_DECODES, key=lambda kind: kinds.get(kind, 0))
    return most if kinds.get(most) else "png"


def decode(data: bytes, kind: str | None = None) -> Image.Image:
    """Decode an image in full; DALI cannot skip a corrupt one.

    Args:
        data: the encoded image.
        kind: what it must be, a value of KINDS; None for any of them.

    Raises:
        ValueError: it is empty, corrupt or of another kind; says which.
    """
    if not data:
        raise ValueError("empty file" if kind else "no bytes")
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
    if kind not in (None, found):
        raise ValueError(f"wrong extension, it is {found}")
    return image


def kind_in(data: bytes) -> str | None:
    """The kind of image that the bytes hold, None if they hold none."""
    try:
        return KINDS[decode(data).format or ""]
    except ValueError:
        return None


def stored(data: bytes, kind: str | None, extension: str) -> tuple[bytes, tuple[int, int]]:
    """The image as it goes into a shard, without loss but for jpg, with its height and width.

    Raises:
        ValueError: as of `decode`.
    """
    image = decode(data, kind)
    same = KINDS[image.format or ""] == extension
    return data if same else encode(image, extension), _upright_shape(image)


def encode(image: Image.Image, extension: str) -> bytes:
    """Upright RGB, as DALI decodes the original."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    with io.BytesIO() as file:
        ImageOps.exif_transpose(image).convert("RGB").save(file, **ENCODINGS[extension])
        return file.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3]; lossless."""
    return encode(Image.fromarray(np.ascontiguousarray(pixels)), "png")


def _upright_shape(image: Image.Image) -> tuple[int, int]:
    """Height and width as DALI decodes it, which turns it by its metadata."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except (OSError, ValueError, SyntaxError, struct.error):  # unreadable metadata turn nothing
        turned = False
    return image.size if turned else (image.height, image.width)

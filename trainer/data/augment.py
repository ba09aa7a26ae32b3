"""What is drawn for each view: the parameters of its augmentation, a pure function of seed, view, copy, step and global row.

Nothing here sees an image or keeps a generator. A row of the global batch owns a fixed block of a Philox counter (Salmon et
al. 2011), so a rank makes just its own rows, and two ranks of batch b draw what one rank of batch 2 b draws, bit for bit.
"""

import zlib

import numpy as np

from trainer.config import Augmentation
from trainer.data.views import ViewSpec
from trainer.data.warp import modes

TRIES = 10  # of a crop that fits, as in torchvision's RandomResizedCrop
UNIFORMS = 32  # a row's uniforms: two a try, eleven more, one spare; Philox makes four at a time
LATER = 4  # uniforms of what came later, in a stream of its own, so that the first keeps its bits: three and one spare


def draw(
    augmentation: Augmentation, *, seed: int, view: str, copy: int, step: int, rows: range, side: int = 0
) -> dict[str, np.ndarray]:
    """One draw of the augmentation for every row.

    The crop is torchvision's RandomResizedCrop for a square image of side 1: the first of ten tries that fits, else the
    central one. `crop_box` lays it on an image of any shape.

    Args:
        augmentation: the distribution.
        seed, view, copy, step: which draw this is; `copy` numbers the views of one name.
        rows: consecutive rows of the global batch (or its groups).
        side: modes a side of the elastic transform's displacement, as `warp.modes` gives them; 0 draws no field.

    Returns:
        extent: height and width of the crop, of the side of a square image, [n, 2] in (0, 1]; where corners are inscribed,
            the view is the middle 1 / `warp.reach` of it.
        anchor: where the crop lies, 0 top or left, 1 bottom or right, [n, 2] in [0, 1).
        flip: mirrored left to right, bool [n].
        brightness, contrast, saturation: factors, 1 leaves the image alone, [n].
        hue: turn of the colour circle, [n] in [-0.5, 0.5].
        gray: without colour, bool [n].
        sigma: standard deviation of the blur in pixels of the view, 0 is none, [n].
        solarize: bright values inverted, bool [n].
        angle: of the rotation that follows the flip, degrees counter-clockwise, [n].
        elastic: bent after the rotation, bool [n].
        field: how, the amplitudes of cosine modes in [-1, 1), of which `warp.displacement` makes pixels; 0 where not bent,
            [n, 2 (x, y), side, side]. Only if side > 0.
        Floats are float32.
    """
    a = augmentation
    u = _uniforms(seed, view, copy, step, rows)
    solarize, angle, elastic, _ = _uniforms(seed, view, copy, step, rows, stream=1, width=LATER).T
    extent, fits = _crop(a, u[:, :TRIES], u[:, TRIES : 2 * TRIES])
    y, x, flip, jitter, brightness, contrast, saturation, hue, gray, blur, sigma = u[:, 2 * TRIES : UNIFORMS - 1].T
    jittered = jitter < a.jitter

    def factor(uniform: np.ndarray, strength: float) -> np.ndarray:
        return np.where(jittered, 1 + strength * (2 * uniform - 1), 1)

    drawn = {
        "extent": extent,
        "anchor": np.where(fits[:, None], np.stack([y, x], 1), 0.5),
        "flip": flip < a.flip,
        "brightness": factor(brightness, a.brightness),
        "contrast": factor(contrast, a.contrast),
        "saturation": factor(saturation, a.saturation),
        "hue": factor(hue, a.hue) - 1,
        "gray": gray < a.grayscale,
        "sigma": np.where(blur < a.blur, _between(a.blur_sigma, sigma), 0),
        "solarize": solarize < a.solarize,
        "angle": a.rotation * (2 * angle - 1),
        "elastic": elastic < a.elastic,
    }
    if side:
        width = -(-2 * side**2 // 4) * 4
        field = _uniforms(seed, view, copy, step, rows, stream=2, width=width)[:, : 2 * side**2]
        drawn["field"] = np.where(drawn["elastic"][:, None], 2 * field - 1, 0).reshape(-1, 2, side, side)
    return {name: value if value.dtype == bool else value.astype(np.float32) for name, value in drawn.items()}


def draw_view(view: ViewSpec, *, seed: int, step: int, rank: int, batch_size: int, world_size: int) -> dict[str, np.ndarray]:
    """The draws of one rank's batch: `draw` for every copy, shared as the view says; [count, batch_size, ...]."""
    if view.augmentation is None:
        return {}
    share = {"image": 1, "group": batch_size * world_size // max(1, view.groups), "dataset": batch_size}[view.shared_by]
    first, last = rank * batch_size // share, (rank + 1) * batch_size // share
    if view.shared_by == "dataset":
        step, first, last = 0, 0, 1
    copies = [augmentation for copy in range(view.count) if (augmentation := view.of(copy))]
    side = modes(view.size) if any(augmentation.elastic for augmentation in copies) else 0
    drawn = [
        draw(augmentation, seed=seed, view=view.name, copy=copy, step=step, rows=range(first, last), side=side)
        for copy, augmentation in enumerate(copies)
    ]
    return {name: np.repeat(np.stack([one[name] for one in drawn]), share, axis=1) for name in drawn[0]}


def crop_box(extent: np.ndarray, anchor: np.ndarray, height: int, width: int) -> np.ndarray:
    """The crops in an image, [..., 4]: top, left, bottom, right, as fractions of its height and width.

    Draws come before the image is known, and a group shares them over images of many shapes. So a draw fixes the area (as a
    fraction of the image), the ratio in pixels and the relative place. Where such a box does not fit an oblong image, the
    largest box of the same ratio is taken (torchvision draws again); in a square image every box fits. `pipeline.py` does
    the same in its graph where the images differ in shape.
    """
    sides = extent * np.sqrt([width / height, height / width]).astype(extent.dtype)
    sides = sides / np.maximum(1, sides.max(-1, keepdims=True))
    start = anchor * (1 - sides)
    return np.concatenate([start, start + sides], -1)


def _uniforms(seed: int, view: str, copy: int, step: int, rows: range, stream: int = 0, width: int = UNIFORMS) -> np.ndarray:
    """Float64 [rows, width] in [0, 1), width a multiple of 4. The key says which stream, the counter which step and row."""
    key = np.random.SeedSequence([seed, zlib.crc32(view.encode()), copy, stream]).generate_state(2, np.uint64)
    counter = np.array([rows.start * width // 4, step, 0, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random((len(rows), width))


def _crop(a: Augmentation, area_tries: np.ndarray, ratio_tries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height and width [n, 2] of the first try that fits a unit square, and whether one did [n]."""
    area = _between(a.crop_scale, area_tries)
    low, high = a.crop_ratio
    ratio = np.exp(_between((np.log(low), np.log(high)), ratio_tries))
    tries = np.sqrt(np.stack([area / ratio, area * ratio], -1))
    good = (tries <= 1).all(-1)
    chosen = tries[np.arange(len(tries)), good.argmax(1)]
    nearest = min(max(low, 1.0), high)  # ratio of the largest central box
    central = np.array([min(1, 1 / nearest), min(1, nearest)])
    fits = good.any(1)
    return np.where(fits[:, None], chosen, central), fits


def _between(bounds: tuple[float, float], uniform: np.ndarray) -> np.ndarray:
    low, high = bounds
    return low + (high - low) * uniform

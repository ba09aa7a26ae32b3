"""The transformations under which a probe is tested: CLeVER's, of whole images, drawn by seed (its released code: unseeded)."""

from dataclasses import replace

from torch import Tensor

from trainer.config import Augmentation
from trainer.data.views import ViewSpec

JITTER = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=1.0, grayscale=0.0, blur=0.0)
ROTATION = replace(JITTER, rotation=90.0, corners="zero")  # filled as the released code does

# CLeVER (Song et al. 2024), evaluation.
TRANSFORMATIONS = {
    "jitter": JITTER,
    "flip_jitter": replace(JITTER, flip=0.5),
    "rotation90_jitter": ROTATION,
    "rotation180_jitter": replace(ROTATION, rotation=180.0),
    **{f"rotation90_jitter_elastic{a}": replace(ROTATION, elastic=1.0, elastic_alpha=float(a)) for a in (50, 100, 150)},
}


def transformed(name: str, size: int) -> ViewSpec:
    """The view in which every test image is transformed once, before `centre` cuts it as the evaluation view is cut.

    The released code turns what was cut, so its corners are blacker above 64 pixels. Of an oblong image the square is drawn.
    """
    return ViewSpec(name, 1, size if size <= 64 else round(size * 256 / 224), TRANSFORMATIONS[name])


def centre(images: Tensor, size: int) -> Tensor:
    """The middle [..., size, size] of square images."""
    start = (images.shape[-1] - size) // 2
    return images[..., start : start + size, start : start + size]

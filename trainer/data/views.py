"""What an objective asks of the data path: the views it wants to see, and the batch it gets."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from trainer.config import Augmentation

SharedBy = Literal["image", "group", "dataset"]


@dataclass(frozen=True)
class ViewSpec:
    """A request for `count` views of every image.

    Args:
        name: key of the views in `Batch.views`.
        count: views of each image, at least 1.
        size: height and width, pixels.
        augmentation: what is drawn, for all copies or one for each; None is the deterministic evaluation view (resize and
            centre crop).
        shared_by: who shares one draw: no one ("image"), the images of a group ("group", CARE sec. 3),
            or all images of the data set ("dataset": the same `count` transformations in every batch).
        groups: number of groups in the global batch, for `shared_by="group"`; group g holds
            consecutive rows, so that rank-local groups are slices.
    """

    name: str
    count: int
    size: int
    augmentation: Augmentation | tuple[Augmentation, ...] | None
    shared_by: SharedBy = "image"
    groups: int = 0

    def of(self, copy: int) -> Augmentation | None:
        """What is drawn for one of the copies."""
        return self.augmentation[copy] if isinstance(self.augmentation, tuple) else self.augmentation


@dataclass
class Batch:
    """One step's worth of images on one rank.

    Shape:
        views[name]: float32 [count, B, 3, size, size], normalised.
        index: int64 [B], position of the image in its split.
        label: int64 [B], -1 where the image has none.
        draws[name][parameter]: [count, B, ...], what was drawn for every view and image, in the units of `augment.draw`;
            nothing for evaluation views.
    """

    views: dict[str, Tensor]
    index: Tensor
    label: Tensor
    draws: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

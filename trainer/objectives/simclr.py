"""SimCLR: the two views of an image are told from all other views of the batch."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from trainer.config import Augmentation, setting
from trainer.data.views import Batch, ViewSpec
from trainer.engine.world import gather_rows, local_rows
from trainer.models.heads import projector
from trainer.objectives.objective import Loss, Objective, register
from trainer.ops.contrastive import nt_xent


@register("simclr")
class SimCLR(Objective):
    """NT-Xent with negatives from all ranks (Chen et al. 2020; CARE's base, sec. 3)."""

    @dataclass(frozen=True)
    class Settings:
        """SimCLR's settings; the defaults are CARE's CIFAR runs."""

        name: str = setting("simclr", "this objective")
        temperature: float = setting(0.5, "temperature of the softmax", low=1e-3, high=10)
        hidden: int = setting(512, "width of the projector", low=1)
        dim: int = setting(128, "dimension d of the embedding", low=2)

    def __init__(self, backbone: Any, settings: Settings, augmentation: Augmentation, size: int) -> None:
        super().__init__(backbone, settings, augmentation, size)
        self.projector = projector(backbone.num_features, settings.hidden, settings.dim)

    def views(self) -> list[ViewSpec]:
        """Two views of every image, all drawn independently."""
        return [ViewSpec("base", 2, self.size, self.augmentation)]

    def embed(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to the unit sphere, float32 [N, d]."""
        return F.normalize(self.projector(self.encode(images)))

    def loss(self, views: Tensor) -> Loss:
        """NT-Xent of [2, B, 3, H, W]; both views pass the encoder together, so they share batch statistics."""
        z = self.embed(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        contrastive = nt_xent(gather_rows(z[0]), gather_rows(z[1]), self.settings.temperature, local_rows(views.shape[1]))
        return Loss(contrastive, {"contrastive": contrastive.detach()}, z)

    def forward(self, batch: Batch) -> Loss:
        """The loss of the batch's base views."""
        return self.loss(batch.views["base"])

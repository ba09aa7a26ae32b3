"""MoCo-v2: the key of an image's other view is told from a queue of past keys."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import setting
from trainer.models.heads import mlp
from trainer.objectives.objective import register
from trainer.objectives.siamese import Branch, Outputs, Siamese, gather_views


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """-log of the softmax weight of a query's own key among it and the negatives (He et al. 2020, eq. 1).

    Args:
        queries, keys: unit-norm, [..., d]; the key of a query stands in its place.
        negatives: unit-norm, [K, d].
        temperature: positive scalar.

    Returns: mean over queries, scalar.
    """
    positive = (queries * keys).sum(-1, keepdim=True)
    logits = torch.cat([positive, queries @ negatives.T], dim=-1) / temperature
    return (logits.logsumexp(-1) - logits[..., 0]).mean()


class MoCoBranch(Branch):
    """A head without BatchNorm, its moving average, and the queue: a ring, the same on all ranks."""

    teacher = True
    gathers = 1
    queue: Tensor  # [K, d], unit-norm
    oldest: Tensor  # row that the next key replaces

    def __init__(self, features: int, settings: Any) -> None:
        super().__init__(features, settings)
        self.register_buffer("queue", F.normalize(torch.randn(settings.queue, settings.dim), dim=-1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.keys: Tensor | None = None  # of this step, [2, B, d], until they join the queue

    def heads(self, features: int) -> tuple[nn.Module, nn.Module]:
        """The two-layer head of MoCo-v2."""
        return mlp(features, self.settings.hidden, self.settings.dim, norm=False), nn.Identity()

    def loss(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE of both views, each with the other's key."""
        self.keys = keys = F.normalize(outputs.target, dim=-1)
        contrastive = info_nce(outputs.embedding[:2], keys.flip(0), self.queue, self.settings.temperature)
        return contrastive, {"contrastive": contrastive.detach()}

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        """The teacher follows; the keys of all ranks replace the oldest, view by view, image by image."""
        super().after_step(momentum)
        if self.keys is None:  # the loss was not asked for
            return
        size = len(self.queue)
        newest = gather_views(self.keys).flatten(0, 1)[-size:]
        rows = (self.oldest + torch.arange(len(newest), device=newest.device)) % size
        self.queue.index_copy_(0, rows, newest)
        self.oldest.add_(len(newest)).remainder_(size)
        self.keys = None


@register("moco")
class MoCo(Siamese):
    """InfoNCE against a queue (He et al. 2020; Chen et al. 2020, arXiv 2003.04297), here of both views.

    The paper's loss is one-sided: the first view queries, the second is the key. Ours is the mean of both directions, as in
    the authors' CIFAR demo, and both views' keys join the queue.
    """

    @dataclass(frozen=True)
    class Settings:
        """MoCo-v2's settings; the defaults are the paper's for ImageNet."""

        name: str = setting("moco", "this objective")
        temperature: float = setting(0.2, "temperature of the softmax", low=1e-3, high=10)
        queue: int = setting(65536, "keys that serve as negatives; each step adds two per image", low=1)
        momentum: float = setting(0.999, "momentum of the teacher at the start", low=0.0, high=1.0)
        momentum_end: float = setting(0.999, "momentum of the teacher at the end, half a cosine away", low=0.0, high=1.0)
        hidden: int = setting(2048, "width of the head", low=1)
        dim: int = setting(128, "dimension d of the embedding", low=2)

    branch_type = MoCoBranch

"""MoCo-v3: a prediction finds its image's key among the keys of the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import setting
from trainer.engine.world import local_rows
from trainer.models.heads import mlp
from trainer.objectives.objective import register
from trainer.objectives.siamese import Branch, Outputs, Siamese, gather_views


def batch_info_nce(queries: Tensor, keys: Tensor, temperature: float, rows: slice = slice(None)) -> Tensor:
    """InfoNCE with the batch's other keys as negatives, times 2 tau, summed over views (Chen et al. 2021, alg. 1).

    The mean over disjoint `rows` that cover the batch is the loss of the batch.

    Args:
        queries: unit-norm, of this rank, [2, B, d].
        keys: unit-norm, of all ranks, [2, N, d]; a query belongs to the key of the other view.
        temperature: tau, positive scalar.
        rows: where the queries' images stand among the N.
    """
    logits = queries @ keys.flip(0).transpose(1, 2) / temperature
    right = torch.arange(keys.shape[1], device=keys.device)[rows].repeat(2)
    return 4 * temperature * F.cross_entropy(logits.flatten(0, 1), right)


class MoCoV3Branch(Branch):
    """Projector and predictor that end in a BatchNorm; keys come from a teacher, which has no predictor."""

    teacher = True
    gathers = 1

    def heads(self, features: int) -> tuple[nn.Module, nn.Module]:
        """The paper's heads."""
        s = self.settings
        return (
            mlp(features, s.hidden, s.dim, s.layers, last_norm=True),
            mlp(s.dim, s.hidden, s.dim, last_norm=True),
        )

    def loss(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE of both views, each with the other's keys."""
        queries, keys = F.normalize(outputs.online[:2], dim=-1), gather_views(F.normalize(outputs.target, dim=-1))
        contrastive = batch_info_nce(queries, keys, self.settings.temperature, local_rows(queries.shape[1]))
        return contrastive, {"contrastive": contrastive.detach()}


@register("moco_v3")
class MoCoV3(Siamese):
    """InfoNCE of predictions against a teacher's keys (Chen, Xie, He 2021, arXiv 2104.02057)."""

    @dataclass(frozen=True)
    class Settings:
        """MoCo-v3's settings; the defaults are the paper's for ViT."""

        name: str = setting("moco_v3", "this objective")
        temperature: float = setting(0.2, "temperature of the softmax", low=1e-3, high=10)
        momentum: float = setting(0.99, "momentum of the teacher at the start", low=0.0, high=1.0)
        momentum_end: float = setting(1.0, "momentum of the teacher at the end, half a cosine away", low=0.0, high=1.0)
        layers: int = setting(3, "linear maps of the projector; the paper has 2 for ResNets", low=1)
        hidden: int = setting(4096, "width of the heads", low=1)
        dim: int = setting(256, "dimension d of the embedding", low=2)

    branch_type = MoCoV3Branch

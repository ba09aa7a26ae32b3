"""BYOL: one view predicts what a teacher makes of the other."""

from dataclasses import dataclass

from torch import Tensor, nn

from trainer.config import setting
from trainer.models.heads import mlp
from trainer.objectives.objective import register
from trainer.objectives.siamese import Branch, Outputs, Siamese


class BYOLBranch(Branch):
    """Projector and predictor of one shape; targets are the projections of a teacher."""

    teacher = True

    def heads(self, features: int) -> tuple[nn.Module, nn.Module]:
        """The paper's heads."""
        s = self.settings
        return mlp(features, s.hidden, s.dim, last_bias=False), mlp(s.dim, s.hidden, s.dim, last_bias=False)

    def loss(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared distance of unit vectors, 2 - 2 cos, summed over both directions (Grill et al. 2020, eq. 2)."""
        cosine = outputs.agreement()
        return 4 - 4 * cosine, {"cosine": cosine.detach()}


@register("byol")
class BYOL(Siamese):
    """Prediction of a teacher's projection, without negatives (Grill et al. 2020, arXiv 2006.07733)."""

    @dataclass(frozen=True)
    class Settings:
        """BYOL's settings; the defaults are the paper's for ImageNet, 1,000 epochs."""

        name: str = setting("byol", "this objective")
        momentum: float = setting(0.996, "momentum of the teacher at the start", low=0.0, high=1.0)
        momentum_end: float = setting(1.0, "momentum of the teacher at the end, half a cosine away", low=0.0, high=1.0)
        hidden: int = setting(4096, "width of projector and predictor", low=1)
        dim: int = setting(256, "dimension d of the embedding", low=2)

    branch_type = BYOLBranch

"""SimSiam: one view predicts the other's projection, which gets no gradient."""

from dataclasses import dataclass

from torch import Tensor, nn

from trainer.config import setting
from trainer.models.heads import mlp
from trainer.objectives.objective import register
from trainer.objectives.siamese import Branch, Outputs, Siamese


class SimSiamBranch(Branch):
    """A projector that ends in a BatchNorm, and a predictor with a bottleneck."""

    stop_gradient = True

    def heads(self, features: int) -> tuple[nn.Module, nn.Module]:
        """The paper's heads."""
        s = self.settings
        return mlp(features, s.hidden, s.dim, s.layers, last_norm=True), mlp(s.dim, s.bottleneck, s.dim)

    def loss(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative cosine, the mean of both directions (Chen, He 2021, eq. 2)."""
        cosine = outputs.agreement()
        return -cosine, {"cosine": cosine.detach()}


@register("simsiam")
class SimSiam(Siamese):
    """Prediction with a stop-gradient: neither negatives nor teacher (Chen, He 2021, arXiv 2011.10566)."""

    @dataclass(frozen=True)
    class Settings:
        """SimSiam's settings; the defaults are the paper's for ImageNet."""

        name: str = setting("simsiam", "this objective")
        layers: int = setting(3, "linear maps of the projector; the paper has 2 on CIFAR-10", low=1)
        hidden: int = setting(2048, "width of the projector", low=1)
        dim: int = setting(2048, "dimension d of the embedding", low=2)
        bottleneck: int = setting(512, "hidden width of the predictor", low=1)

    branch_type = SimSiamBranch

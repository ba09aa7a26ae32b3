"""VICReg: views agree, every dimension varies, and no two dimensions vary together."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import setting
from trainer.models.heads import mlp
from trainer.objectives.barlow import off_diagonal
from trainer.objectives.objective import register
from trainer.objectives.siamese import Branch, Outputs, Siamese, gather_views

EPS = 1e-4  # added to the variances (alg. 1)


def vicreg(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of two views' embeddings [2, N, d] (Bardes et al. 2022, alg. 1).

    Returns: mean squared difference of the views; how far the standard deviations fall short of 1, a mean over dimensions;
        squared covariances of two dimensions, summed, divided by d. The last two are sums over both views. Scalars.
    """
    _, n, d = z.shape
    invariance = F.mse_loss(z[0], z[1])
    variance = F.relu(1 - (z.var(1) + EPS).sqrt()).mean(1).sum()
    centred = z - z.mean(1, keepdim=True)
    covariances = centred.transpose(1, 2) @ centred / (n - 1)
    return invariance, variance, off_diagonal(covariances).square().sum() / d


class VICRegBranch(Branch):
    """A wide projector, the paper's expander; both views are online and target at once."""

    gathers = 3

    def heads(self, features: int) -> tuple[nn.Module, nn.Module]:
        """The paper's expander."""
        s = self.settings
        return mlp(features, s.hidden, s.dim, s.layers, last_bias=False), nn.Identity()

    def loss(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Every rank computes the loss of the joint batch: a variance is no mean of the ranks' own."""
        s = self.settings
        invariance, variance, covariance = vicreg(gather_views(outputs.online[:2]))
        total = s.invariance * invariance + s.variance * variance + s.covariance * covariance
        terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return total, {name: term.detach() for name, term in terms.items()}


@register("vicreg")
class VICReg(Siamese):
    """Variance, invariance, covariance (Bardes, Ponce, LeCun 2022, arXiv 2105.04906)."""

    @dataclass(frozen=True)
    class Settings:
        """VICReg's settings; the defaults are the paper's for ImageNet."""

        name: str = setting("vicreg", "this objective")
        invariance: float = setting(25.0, "weight of the views' squared difference; the paper's lambda", low=0.0)
        variance: float = setting(25.0, "weight of the missing standard deviation; mu (released code: half of it)", low=0.0)
        covariance: float = setting(1.0, "weight of the squared covariances; nu", low=0.0)
        layers: int = setting(3, "linear maps of the projector", low=1)
        hidden: int = setting(8192, "width of the projector", low=1)
        dim: int = setting(8192, "dimension d of the embedding", low=2)

    branch_type = VICRegBranch

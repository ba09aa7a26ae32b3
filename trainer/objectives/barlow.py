"""Barlow Twins: the cross-correlation of two views' embeddings becomes the identity."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import setting
from trainer.models.heads import mlp
from trainer.objectives.objective import register
from trainer.objectives.siamese import Branch, Outputs, Siamese, gather_views

EPS = 1e-5  # added to the variances, as the released code's BatchNorm does


def barlow_twins(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums over the cross-correlation matrix C of standardised dimensions (Zbontar et al. 2021, eq. 1, 2).

    Args:
        z1, z2: embeddings of two views, [N, d]; row i of both is the same image.

    Returns: sum of (1 - C_ii)^2, and of C_ij^2 over i != j, scalars.
    """
    a, b = (F.batch_norm(z, None, None, training=True, eps=EPS) for z in (z1, z2))
    correlation = a.T @ b / len(a)
    return (1 - correlation.diagonal()).square().sum(), off_diagonal(correlation).square().sum()


def off_diagonal(matrix: Tensor) -> Tensor:
    """What is not on the diagonal, [..., d, d] -> [..., d - 1, d], a view: the first of every d + 1 entries is on it."""
    d = matrix.shape[-1]
    return matrix.flatten(-2)[..., :-1].unflatten(-1, (d - 1, d + 1))[..., 1:]


class BarlowBranch(Branch):
    """A wide projector; both views are online and target at once."""

    gathers = 3

    def heads(self, features: int) -> tuple[nn.Module, nn.Module]:
        """The paper's projector."""
        s = self.settings
        return mlp(features, s.hidden, s.dim, s.layers, last_bias=False), nn.Identity()

    def loss(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Every rank computes the loss of the joint batch: a correlation is no mean of the ranks' own."""
        invariance, redundancy = barlow_twins(*gather_views(outputs.online[:2]))
        total = invariance + self.settings.redundancy * redundancy
        return total, {"invariance": invariance.detach(), "redundancy": redundancy.detach()}


@register("barlow")
class BarlowTwins(Siamese):
    """Redundancy reduction (Zbontar et al. 2021, arXiv 2103.03230)."""

    @dataclass(frozen=True)
    class Settings:
        """Barlow Twins' settings; the defaults are the paper's for ImageNet."""

        name: str = setting("barlow", "this objective")
        redundancy: float = setting(0.0051, "weight of the off-diagonal entries; the paper's lambda", low=0.0)
        layers: int = setting(3, "linear maps of the projector", low=1)
        hidden: int = setting(8192, "width of the projector", low=1)
        dim: int = setting(8192, "dimension d of the embedding", low=2)

    branch_type = BarlowBranch

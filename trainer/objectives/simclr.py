"""SimCLR: the two views of an image are told from all other views of the batch."""

from dataclasses import dataclass

from torch import Tensor, nn

from trainer.config import setting
from trainer.engine.world import gather_rows, local_rows
from trainer.models.heads import mlp
from trainer.objectives.objective import register
from trainer.objectives.siamese import Branch, Outputs, Siamese
from trainer.ops.contrastive import nt_xent


class SimCLRBranch(Branch):
    """A projector; both views are online and target at once."""

    gathers = 3

    def heads(self, features: int) -> tuple[nn.Module, nn.Module]:
        """CARE's projector."""
        return mlp(features, self.settings.hidden, self.settings.dim), nn.Identity()

    def loss(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent of the two embeddings."""
        z = outputs.embedding
        contrastive = nt_xent(gather_rows(z[0]), gather_rows(z[1]), self.settings.temperature, local_rows(z.shape[1]))
        return contrastive, {"contrastive": contrastive.detach()}


@register("simclr")
class SimCLR(Siamese):
    """NT-Xent with negatives from all ranks (Chen et al. 2020; CARE's base, sec. 3)."""

    @dataclass(frozen=True)
    class Settings:
        """SimCLR's settings; the defaults are CARE's CIFAR runs."""

        name: str = setting("simclr", "this objective")
        temperature: float = setting(0.5, "temperature of the softmax", low=1e-3, high=10)
        hidden: int = setting(512, "width of the projector", low=1)
        dim: int = setting(128, "dimension d of the embedding", low=2)

    branch_type = SimCLRBranch

"""CLeVER: the representation is cut, a base objective makes one part invariant and the other part keeps what differs."""

from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import Augmentation, Run, setting
from trainer.data.views import Batch
from trainer.engine.world import gather_rows
from trainer.errors import UserError
from trainer.objectives.objective import Loss, Wrapper, register, registry
from trainer.objectives.siamese import Branch, Siamese, other_views


@register("clever")
class Clever(Wrapper):
    """A base objective on the invariant part of the features, orthogonality of the views on the equivariant rest.

    The parts have heads and centres of their own, of the base's kind (Song et al. 2024, sec. 3; as DDCL on
    SimSiam, Wang et al. 2024).

    The embedding is the equivariant part's: in CARE it turns, while the base holds the other part still. Rotations that CARE
    finds are then orderly answers to an augmentation, where orthogonality alone asks for any that are far enough.
    """

    base: Siamese

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """CLeVER's settings."""

        name: str = setting("clever", "this objective")
        base: Any = setting(MISSING, "the base objective: its `name` and settings")
        cut: float = setting(0.8, "share of the features that is the invariant part, the first ones", low=0.0, high=1.0)
        weight: float = setting(1.0, "weight of the orthogonality of the equivariant part", low=0.0)
        head_norm: float = setting(0.001, "weight of the difference of the two heads' squared norms", low=0.0)
        reference: bool = setting(
            False, "orthogonality as released: the size of the mean cosine, in which images cancel; else the mean of the sizes"
        )

    @classmethod
    def check(cls, settings: Settings, run: Run, path: str) -> None:
        """The base has branches, of which each part of the features gets one."""
        if not issubclass(registry()[settings.base.name], Siamese):
            siamese = [name for name, each in sorted(registry().items()) if issubclass(each, Siamese)]
            raise UserError(
                f"the base of clever is '{settings.base.name}'",
                f"one of {', '.join(siamese)}",
                "Put care around clever, not within; cut once.",
            )
        super().check(settings, run, path)

    def __init__(self, backbone: nn.Module, settings: Settings, augmentation: Augmentation, size: int) -> None:
        features: int = backbone.num_features  # type: ignore[assignment]
        cut = int(settings.cut * features)
        if not 0 < cut < features:
            found = f"objective.cut {settings.cut} leaves {cut} of {features} features to the invariant part"
            raise UserError(found, "two parts", "Choose a cut between, such as 0.8.")
        super().__init__(backbone, settings, augmentation, size, part=slice(0, cut))
        self.rest = slice(cut, features)
        self.equivariant = self.base.branch_type(features - cut, settings.base)

    def embed(self, images: Tensor) -> Tensor:
        """The equivariant part's embedding, [N, d]: in CARE this is what turns."""
        return self.equivariant.embed(self.base.encode(images)[:, self.rest])

    def loss(self, pair: Tensor, batch: Batch) -> Loss:
        """The base's loss of one part, the orthogonality of the other, and the balance of their heads."""
        s = self.settings
        online, target = self.base.features(pair, batch)
        invariant = self.base.compare(online, target)
        outputs = self.equivariant(online[..., self.rest], target[..., self.rest])
        orthogonality = overlap(*self.equivariant.directions(outputs), reference=s.reference)
        imbalance = head_imbalance(self.base.branch, self.equivariant)
        total = invariant.total + s.weight * orthogonality + s.head_norm * imbalance
        terms = {"orthogonality": orthogonality.detach(), "head_imbalance": imbalance.detach()}
        return Loss(total, invariant.terms | terms, outputs.embedding[:2])

    def forward(self, batch: Batch) -> Loss:
        """The loss of the batch's base views."""
        return self.loss(batch.views["base"], batch)

    def represent(self, images: Tensor) -> dict[str, Tensor]:
        """The base's parts, and of each, "full" and "last4", the invariant and the equivariant share of every block's token."""
        whole = self.base.represent(images)
        shares = {}
        for name, x in whole.items():
            prefix = "" if name == "full" else f"{name}_"
            blocks = x.unflatten(1, (-1, self.rest.stop))
            shares[f"{prefix}invariant"] = blocks[..., self.base.part].flatten(1)
            shares[f"{prefix}equivariant"] = blocks[..., self.rest].flatten(1)
        return whole | shares

    def before_step(self, progress: float, epoch: float) -> None:
        """Both parts alike."""
        self.base.before_step(progress, epoch)
        self.equivariant.before_step(progress, epoch)

    def after_step(self) -> None:
        """Both parts alike."""
        self.base.after_step()
        self.equivariant.after_step(self.base.momentum)


def overlap(online: Tensor, target: Tensor, *, reference: bool) -> Tensor:
    """How far views are from orthogonal: the mean of |cos| over images and pairs of target g and online view v != g (DVR).

    Args:
        online, target: vectors of the views, [V, B, o] and [2, B, o].
        reference: |mean of cos| over the images of all ranks, where images of opposite sign cancel.

    Returns: scalar, 0 for orthogonal views.
    """
    cosine = torch.einsum("gbo,vbo->gvb", F.normalize(target, dim=-1), F.normalize(online, dim=-1))
    pairs = other_views(cosine)
    return gather_rows(pairs.mean(0)).mean().abs() if reference else pairs.abs().mean()


def head_imbalance(first: Branch, second: Branch) -> Tensor:
    """Mean over heads (projector; predictor, where there is one) of the difference of their squared norms (PReg)."""
    norms = [torch.stack([sum_of_squares(head) for head in branch.weights()]) for branch in (first, second)]
    return (norms[0] - norms[1]).abs().mean()


def sum_of_squares(weights: list[Tensor]) -> Tensor:
    """Of all numbers in all tensors."""
    return torch.stack([weight.square().sum() for weight in weights]).sum()

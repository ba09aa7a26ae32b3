"""CARE: any base objective, and rotations that relate the embeddings of jointly augmented images."""

from dataclasses import MISSING, dataclass
from typing import Any, Literal

from trainer.config import Run, setting
from trainer.data.views import Batch, ViewSpec
from trainer.engine.world import world_size
from trainer.errors import UserError
from trainer.objectives.objective import Loss, Wrapper, register
from trainer.ops.gram import gram_equivariance
from trainer.ops.rotation_fit import rotation_equivariance

TERMS = {"gram": gram_equivariance, "rotation": rotation_equivariance}


@register("care")
class Care(Wrapper):
    """A base objective plus rotational equivariance of the embedding (CARE, sec. 3).

    Every group of images shares one pair of augmentations (a, a'), a pair of its own (the released code gives all
    groups of a step the same pair).
    """

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """CARE's settings."""

        name: str = setting("care", "this objective")
        base: Any = setting(MISSING, "the base objective: its `name` and settings")
        weight: float = setting(1.0, "weight of the equivariance term, a mean over pairs (gram) or images (rotation)", low=0.0)
        groups: int = setting(16, "groups in the global batch; the paper's splits", low=1)
        term: Literal["gram", "rotation"] = setting(
            "gram", "gram: change of the inner products; rotation: what the best orthogonal map of a group leaves"
        )
        views: Literal["shared", "separate"] = setting(
            "shared", "shared: the base loss sees the group-shared views (2 passes); separate: views of its own (4 passes)"
        )
        reference_scale: bool = setting(False, "multiply the weight by the released code's 2 (m - 1), m images a group")

    @classmethod
    def check(cls, settings: Settings, run: Run, path: str) -> None:
        """CARE is not its own base, and the released scale is the Gram term's."""
        if settings.base.name == settings.name:
            raise UserError(f"{path}.base.name is 'care'", "an objective that has a loss of its own", "Use simclr.")
        if settings.reference_scale and settings.term != "gram":
            raise UserError(
                f"{path}.reference_scale is true, {path}.term is '{settings.term}'",
                "the released code's scale with its term, gram",
                f"Set {path}.reference_scale to false and choose the weight anew.",
            )
        super().check(settings, run, path)

    def views(self) -> list[ViewSpec]:
        """One pair of views per group of images; beside the base's own where views are separate."""
        paired = ViewSpec("paired", 2, self.size, self.augmentation.pair(), shared_by="group", groups=self.settings.groups)
        pair, *others = self.base.views()
        return [paired, *others] if self.settings.views == "shared" else [pair, *others, paired]

    def forward(self, batch: Batch) -> Loss:
        """The base's loss plus the weighted equivariance term of the paired views."""
        paired = batch.views["paired"]
        if self.settings.views == "shared":
            base = self.base.loss(paired, batch)
            z = base.embeddings
        else:
            base = self.base(batch)
            z = self.embed(paired.flatten(0, 1)).unflatten(0, paired.shape[:2])
        groups = self.settings.groups // world_size()
        equivariance = TERMS[self.settings.term](z[0], z[1], groups)
        weight = self.settings.weight
        if self.settings.reference_scale:
            weight = weight * 2 * (paired.shape[1] // groups - 1)
        return Loss(base.total + weight * equivariance, base.terms | {"equivariance": equivariance.detach()}, z)

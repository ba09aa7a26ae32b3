"""What all Siamese methods share: views pass an encoder (and its teacher), and a branch makes a loss of their features.

A method is a `Branch`: heads, and a loss between their outputs. `Siamese` is everything around it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import Augmentation, Run
from trainer.data.views import Batch, ViewSpec
from trainer.engine.world import gather_rows
from trainer.errors import UserError
from trainer.models.momentum import Momentum, cosine
from trainer.objectives.objective import Loss, Objective


@dataclass(frozen=True)
class Outputs:
    """What a branch makes of the views of B images.

    Args:
        online: predictions of all V views, with gradient, [V, B, o]; the pair first, local crops after it.
        target: what they should agree with, of the pair only, [2, B, o].
        embedding: of all views, unit-norm, with gradient, [V, B, d]: what turns in CARE.
    """

    online: Tensor
    target: Tensor
    embedding: Tensor

    def agreement(self) -> Tensor:
        """Mean cosine, scalar, between the online vector of each view of the pair and the target of the other."""
        return F.cosine_similarity(self.online[:2], self.target.flip(0), dim=-1).mean()


def gather_views(x: Tensor) -> Tensor:
    """The views of all ranks' images, [V, B, d] -> [V, world * B, d], with gradients to every rank's own."""
    return gather_rows(x.transpose(0, 1)).transpose(0, 1)


def other_views(table: Tensor) -> Tensor:
    """Of a table [2, V, ...] of target against online views, the 2 (V - 1) entries of two different views."""
    return torch.cat([table[0, 1:], table[1, :1], table[1, 2:]])


class Branch(nn.Module):
    """The heads of a method on `features` numbers per image, and its loss.

    By default a projector and, if the method has one, a predictor; the target is the projection of a momentum teacher
    where `teacher` is set, else of the online network itself, with its gradient where `stop_gradient` is not set.

    Args:
        features: width D of what the branch reads.
        settings: of the method.
    """

    teacher: ClassVar[bool] = False  # targets come from a moving average of encoder and projector
    stop_gradient: ClassVar[bool] = False  # targets carry no gradient
    gathers: ClassVar[int] = 0  # times that an embedding of the pair travels: forward, and twice more with its gradient

    def __init__(self, features: int, settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.projector, self.predictor = self.heads(features)
        self.target_projector = Momentum(self.projector) if self.teacher else None

    def heads(self, features: int) -> tuple[nn.Module, nn.Module]:
        """Projector and predictor (Identity if the method has none), on rows [N, features]."""
        raise NotImplementedError

    def embed(self, features: Tensor) -> Tensor:
        """The unit-norm projection, [N, D] -> [N, d]."""
        return F.normalize(self.projector(features), dim=-1)

    def forward(self, online: Tensor, target: Tensor) -> Outputs:
        """Outputs for the features of all views [V, B, D] and the teacher's (or the same) features of the pair [2, B, D]."""
        views = online.shape[:2]
        z = self.projector(online.flatten(0, 1))
        prediction = self.predictor(z).unflatten(0, views)
        if self.target_projector is not None:
            goal = self.target_projector(target.flatten(0, 1)).unflatten(0, target.shape[:2])
        else:
            goal = z.unflatten(0, views)[:2]
        return Outputs(prediction, goal.detach() if self.stop_gradient else goal, F.normalize(z, dim=-1).unflatten(0, views))

    def loss(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's loss over all ranks' images, and detached scalars to record."""
        raise NotImplementedError

    def directions(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Online [V, B, o] and target [2, B, o] vectors whose angle CLeVER's equivariant part sets."""
        return outputs.online, outputs.target

    def weights(self) -> list[list[Tensor]]:
        """The parameters of each online head that has any; CLeVER balances their norms between its parts."""
        return [list(head.parameters()) for head in (self.projector, self.predictor) if list(head.parameters())]

    def before_step(self, progress: float, epoch: float) -> None:
        """Set what depends on how far the run is; both counted before the step."""

    def after_step(self, momentum: float) -> None:
        """Update what follows the weights; `momentum` is the teacher's."""
        if self.target_projector is not None:
            self.target_projector.follow(self.projector, momentum)


class Siamese(Objective):
    """A method: its branch on the features of the encoder, or on a part of them.

    Settings of methods with a teacher have `momentum` and `momentum_end`.

    Args:
        part: columns of the features that the method shapes; CLeVER leaves it less than all.
    """

    branch_type: ClassVar[type[Branch]]

    def __init__(
        self, backbone: nn.Module, settings: Any, augmentation: Augmentation, size: int, part: slice = slice(None)
    ) -> None:
        super().__init__(backbone, settings, augmentation, size)
        features: int = backbone.num_features  # type: ignore[assignment]
        self.part = part
        self.branch = self.branch_type(len(range(features)[part]), settings)
        self.teacher = Momentum(backbone) if self.branch_type.teacher else None
        self.momentum = 0.0

    @classmethod
    def check(cls, settings: Any, run: Run, path: str) -> None:
        """A teacher becomes slower, if anything."""
        if cls.branch_type.teacher and settings.momentum_end < settings.momentum:
            raise UserError(
                f"{path}.momentum_end is {settings.momentum_end:g}, {path}.momentum {settings.momentum:g}",
                "a momentum that does not fall",
                f"Set {path}.momentum_end too, as large or larger.",
            )

    def encoders(self) -> list[nn.Module]:
        """Student and teacher."""
        return [self.backbone, *([] if self.teacher is None else [self.teacher.module])]

    def views(self) -> list[ViewSpec]:
        """Two views of every image, all drawn independently."""
        return [ViewSpec("base", 2, self.size, self.augmentation.pair())]

    def embed(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to the unit sphere, float32 [N, d]."""
        return self.branch.embed(self.encode(images)[:, self.part])

    def features(self, pair: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The online encoder's features of all views [V, B, D] and the teacher's (or the same) of the pair [2, B, D].

        Views of one size pass together, so they share batch statistics.
        """
        views = pair.shape[:2]
        online = self.encode(pair.flatten(0, 1)).unflatten(0, views)
        target = online if self.teacher is None else self.encode(pair.flatten(0, 1), self.teacher).unflatten(0, views)
        for spec in self.views()[1:]:
            small = batch.views[spec.name]
            online = torch.cat([online, self.encode(small.flatten(0, 1)).unflatten(0, small.shape[:2])])
        return online, target

    def loss(self, pair: Tensor, batch: Batch) -> Loss:
        """The loss of two views of every image, [2, B, 3, H, W], and of the batch's local crops where the method has any."""
        online, target = self.features(pair, batch)
        return self.compare(online, target)

    def compare(self, online: Tensor, target: Tensor) -> Loss:
        """The loss of features."""
        outputs = self.branch(online[..., self.part], target[..., self.part])
        total, terms = self.branch.loss(outputs)
        return Loss(total, terms, outputs.embedding[:2])

    def forward(self, batch: Batch) -> Loss:
        """The loss of the batch's base views."""
        return self.loss(batch.views["base"], batch)

    def before_step(self, progress: float, epoch: float) -> None:
        """The teacher's momentum of this step, and what the branch sets."""
        if self.teacher is not None:
            self.momentum = cosine(self.settings.momentum, self.settings.momentum_end, progress)
        self.branch.before_step(progress, epoch)

    def after_step(self) -> None:
        """Teachers follow."""
        if self.teacher is not None:
            self.teacher.follow(self.backbone, self.momentum)
        self.branch.after_step(self.momentum)

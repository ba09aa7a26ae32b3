"""DINO: the student, from small crops too, predicts what its centred and sharpened teacher makes of the other views."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import Run, setting
from trainer.data.views import ViewSpec
from trainer.engine.world import gather_rows
from trainer.errors import UserError
from trainer.models.heads import mlp
from trainer.objectives.objective import register
from trainer.objectives.siamese import Branch, Outputs, Siamese, other_views


class DINOHead(nn.Module):
    """An MLP to a unit-norm bottleneck, and its cosines with `out` prototypes (Caron et al. 2021, sec. 3.1 and app. C).

    The prototypes are the last layer, weight-normed with its gain fixed at 1.

    Shape: [N, features] -> [N, out].
    """

    def __init__(self, features: int, hidden: int, bottleneck: int, out: int, norm: bool = False) -> None:
        super().__init__()
        self.mlp = mlp(features, hidden, bottleneck, 3, norm=norm, activation=nn.GELU)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(out, bottleneck))
        nn.init.kaiming_uniform_(self.prototypes, a=math.sqrt(5))
        self.frozen = False

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        return self.logits(self.bottleneck(features))

    def bottleneck(self, features: Tensor) -> Tensor:
        """[N, features] -> unit-norm [N, bottleneck]."""
        return F.normalize(self.mlp(features), dim=-1)

    def logits(self, z: Tensor) -> Tensor:
        """[N, bottleneck] -> [N, out]."""
        return F.linear(z, F.normalize(self.last(), dim=1))

    def last(self) -> Tensor:
        """The prototypes; while frozen their gradient is zero, but there: engines wait for the gradient of every weight."""
        return self.prototypes.detach() + 0 * self.prototypes if self.frozen else self.prototypes


class DINOBranch(Branch):
    """Cross-entropy of student views against the teacher's view of another crop; a centre keeps the teacher from collapse."""

    teacher = True
    projector: DINOHead
    centre: Tensor

    def __init__(self, features: int, settings: Any) -> None:
        super().__init__(features, settings)
        self.register_buffer("centre", torch.zeros(settings.out))
        self.before_step(0.0, 0.0)

    def heads(self, features: int) -> tuple[nn.Module, nn.Module]:
        """The whole head is the projector, since the teacher has all of it."""
        s = self.settings
        return DINOHead(features, s.hidden, s.bottleneck, s.out, s.norm), nn.Identity()

    def embed(self, features: Tensor) -> Tensor:
        """The unit-norm bottleneck."""
        return self.projector.bottleneck(features)

    def forward(self, online: Tensor, target: Tensor) -> Outputs:
        """Logits of student and teacher; the mean of the teacher's is what the centre follows after the step."""
        z = self.projector.bottleneck(online.flatten(0, 1))
        logits, z = (x.unflatten(0, online.shape[:2]) for x in (self.projector.logits(z), z))
        assert self.target_projector is not None
        goal = self.target_projector(target.flatten(0, 1))
        self.batch_mean = goal.mean(0)
        return Outputs(logits, goal.unflatten(0, target.shape[:2]), z)

    def loss(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of -q_g log p_v over images and pairs of teacher view g and student view v != g (sec. 3.1, eq. 3)."""
        log_p = (outputs.online / self.settings.student_temperature).log_softmax(-1)
        table = -torch.einsum("gbk,vbk->gv", self.sharpened(outputs.target), log_p) / log_p.shape[1]
        distillation = other_views(table).mean()
        return distillation, {"distillation": distillation.detach()}

    def sharpened(self, target: Tensor) -> Tensor:
        """The teacher's distribution q."""
        return ((target - self.centre) / self.temperature).softmax(-1)

    def directions(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """The two distributions, as CLeVER's released code compares them."""
        return (outputs.online / self.settings.student_temperature).softmax(-1), self.sharpened(outputs.target)

    def weights(self) -> list[list[Tensor]]:
        """The head's; nothing moves the last layer while it is frozen."""
        return [[*self.projector.mlp.parameters(), self.projector.last()]]

    def before_step(self, progress: float, epoch: float) -> None:
        """The teacher's temperature, and whether the last layer is frozen."""
        s = self.settings
        warm = min(1.0, epoch / s.temperature_warmup_epochs) if s.temperature_warmup_epochs else 1.0
        self.temperature = s.teacher_temperature_start + (s.teacher_temperature - s.teacher_temperature_start) * warm
        self.projector.frozen = epoch < s.freeze_epochs

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        """The teacher's head follows, and the centre its outputs on all ranks (eq. 4)."""
        super().after_step(momentum)
        self.centre.lerp_(gather_rows(self.batch_mean[None]).mean(0), 1 - self.settings.centre_momentum)


@register("dino")
class DINO(Siamese):
    """Self-distillation with no labels (Caron et al. 2021): 2 + `local_crops` views, all pairs of teacher and other student."""

    @dataclass(frozen=True)
    class Settings:
        """DINO's settings; the defaults are those of CLeVER's runs."""

        name: str = setting("dino", "this objective")
        local_crops: int = setting(8, "small crops of every image, for the student alone; 0: none", low=0)
        local_size: int = setting(96, "height and width of a small crop, pixels", low=8, high=1024)
        hidden: int = setting(2048, "width of the head", low=1)
        bottleneck: int = setting(256, "dimension of the embedding before the last layer, of unit norm", low=2)
        norm: bool = setting(False, "BatchNorms in the head; they keep a small encoder's images apart at the start")
        out: int = setting(65536, "width of the last layer, the number of prototypes", low=2)
        student_temperature: float = setting(0.1, "temperature of the student's softmax", low=1e-3, high=10)
        teacher_temperature: float = setting(0.04, "temperature of the teacher's softmax after its warm-up", low=1e-3, high=10)
        teacher_temperature_start: float = setting(0.04, "the same at the beginning", low=1e-3, high=10)
        temperature_warmup_epochs: float = setting(0.0, "linear warm-up of the teacher's temperature, epochs", low=0.0)
        centre_momentum: float = setting(0.9, "momentum of the centre of the teacher's outputs", low=0.0, high=1.0)
        momentum: float = setting(0.996, "momentum of the teacher at the beginning", low=0.0, high=1.0)
        momentum_end: float = setting(1.0, "momentum of the teacher at the end of its cosine", low=0.0, high=1.0)
        freeze_epochs: float = setting(1.0, "epochs before the last layer begins to learn", low=0.0)

    branch_type = DINOBranch
    remark = "kNN, probe and factors read DINO's teacher; the geometry is of the student's embedding, which CARE turns."

    @classmethod
    def check(cls, settings: Settings, run: Run, path: str) -> None:
        """Small crops are no larger than the global views."""
        super().check(settings, run, path)
        if settings.local_crops and settings.local_size > run.data.size:
            found = f"{path}.local_size is {settings.local_size}, data.size {run.data.size}"
            raise UserError(found, "small crops", f"Set {path}.local_size to half of data.size or so.")

    def views(self) -> list[ViewSpec]:
        """The pair of global views, and the small crops."""
        count, size = self.settings.local_crops, self.settings.local_size
        local = [ViewSpec("local", count, size, self.augmentation.variant("local"))] if count else []
        return [*super().views(), *local]

    def represent(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's: it is the better encoder (sec. 5.2)."""
        assert self.teacher is not None
        return self.probed(images, self.teacher.module)

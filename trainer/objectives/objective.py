"""What an objective is: it says which views it wants to see, and makes a loss of them. And the registry of objectives."""

import importlib
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.config import Augmentation, Run
from trainer.data.views import Batch, ViewSpec


@dataclass(frozen=True)
class Loss:
    """What one forward pass gives.

    Args:
        total: scalar float32, to be minimised.
        terms: detached scalars to record.
        embeddings: unit-norm [V, B, d] of the views the loss saw, with gradient.
    """

    total: Tensor
    terms: dict[str, Tensor]
    embeddings: Tensor


class Objective(nn.Module):
    """Base class. A new objective is one file with one `@register` line.

    Args:
        backbone: images [N, 3, H, W] -> features [N, backbone.num_features].
        settings: an instance of the class's own `Settings`.
        augmentation: the run's view distribution.
        size: height and width of a view, pixels.
    """

    Settings: ClassVar[type]
    remark: ClassVar[str] = ""  # what a reader of an evaluation of the objective must know

    def __init__(self, backbone: nn.Module, settings: Any, augmentation: Augmentation, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.settings = settings
        self.augmentation = augmentation
        self.size = size
        self.bf16 = False
        self.channels_last = False

    @classmethod
    def check(cls, settings: Any, run: Run, path: str) -> None:
        """Refuse settings that do not go together, or not with the rest of the run.

        Args:
            settings: of this objective, `path` in the run: "objective", or "objective.base" within a wrapper.

        Raises:
            UserError: naming the settings.
        """

    def encoders(self) -> list[nn.Module]:
        """The networks that images pass in training."""
        return [self.backbone]

    def encode(self, images: Tensor, backbone: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The features [N, D] of the backbone, or of another such as its teacher, in the type of the images.

        Only the backbone computes in bfloat16: heads and losses are small, and inner products need the bits. channels_last
        is a matter of the images: convolutions follow their input, and DeepSpeed refuses weights in that layout.
        """
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        with torch.autocast(images.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            features: Tensor = (backbone or self.backbone)(images.contiguous(memory_format=layout))
        return features.to(images.dtype)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides biases and norms: the backbone's own list (timm's optimisers ask)."""
        listed: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {name for name, _ in self.named_parameters() if name.rpartition("backbone.")[2] in listed}

    def views(self) -> list[ViewSpec]:
        """The views of every image that `forward` will read from the batch."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to the embedding that the objective shapes, unit-norm float32 [N, d]."""
        raise NotImplementedError

    def loss(self, pair: Tensor, batch: Batch) -> Loss:
        """The loss of two views of every image, [2, B, 3, H, W]; a wrapper such as CARE brings its own pair.

        The batch holds what else the objective asked for.
        """
        raise NotImplementedError

    def forward(self, batch: Batch) -> Loss:
        """The loss of a batch that holds the views asked for."""
        raise NotImplementedError

    def before_step(self, progress: float, epoch: float) -> None:
        """Set what depends on how far the run is (temperatures, momentum): progress in [0, 1), epochs done, before the step."""

    def after_step(self) -> None:
        """Update what follows the weights (teachers, centres, queues)."""

    def represent(self, images: Tensor) -> dict[str, Tensor]:
        """Named parts of the representation for probes: "full" [N, D] and, of a ViT, "last4" [N, 4 D]."""
        return self.probed(images, self.backbone)

    def probed(self, images: Tensor, backbone: nn.Module) -> dict[str, Tensor]:
        """`represent` of a backbone; of a ViT, "last4" are the class tokens of its last blocks (Caron et al. 2021, app. F)."""
        if getattr(backbone, "global_pool", "") != "token" or len(backbone.blocks) < 4:  # type: ignore[arg-type]
            return {"full": self.encode(images, backbone)}
        from trainer.models.backbone import class_tokens  # it imports timm, see `build_objective`

        full, *last = self.encode(images, partial(class_tokens, backbone, 4)).unbind(1)
        return {"full": full, "last4": torch.cat(last, dim=1)}


class Wrapper(Objective):
    """An objective around another, its `base`: what it does not say itself, the base says. Its settings have a `base`."""

    def __init__(self, backbone: nn.Module, settings: Any, augmentation: Augmentation, size: int, **options: Any) -> None:
        nn.Module.__init__(self)  # the backbone belongs to the base: owned twice, it would be saved twice
        self.settings, self.augmentation, self.size = settings, augmentation, size
        self.base: Objective = registry()[settings.base.name](backbone, settings.base, augmentation, size, **options)

    @classmethod
    def check(cls, settings: Any, run: Run, path: str) -> None:
        """The base's settings are checked as if it were alone."""
        registry()[settings.base.name].check(settings.base, run, f"{path}.base")

    def encoders(self) -> list[nn.Module]:
        """None besides the base's, which answers for itself."""
        return []

    def no_weight_decay(self) -> set[str]:
        """The base's, under the names they have here."""
        return {f"base.{name}" for name in self.base.no_weight_decay()}

    def views(self) -> list[ViewSpec]:
        """The base's."""
        return self.base.views()

    def embed(self, images: Tensor) -> Tensor:
        """The base's embedding, [N, d]."""
        return self.base.embed(images)

    def represent(self, images: Tensor) -> dict[str, Tensor]:
        """The base's representation."""
        return self.base.represent(images)

    def before_step(self, progress: float, epoch: float) -> None:
        """The base's own."""
        self.base.before_step(progress, epoch)

    def after_step(self) -> None:
        """The base's own."""
        self.base.after_step()


_REGISTRY: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Class decorator: make an objective available as `objective.name` in settings."""

    def add(cls: type[Objective]) -> type[Objective]:
        _REGISTRY[name] = cls
        return cls

    return add


def registry() -> dict[str, type[Objective]]:
    """Every objective in this folder, by name."""
    package = importlib.import_module("trainer.objectives")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"trainer.objectives.{module.name}")
    return _REGISTRY


def build_objective(run: Run) -> Objective:
    """The objective of a run, backbone and heads freshly initialised from torch's generator."""
    from trainer.models.backbone import build_backbone  # timm costs seconds; checking settings must not

    base = run.objective
    while hasattr(base, "base"):
        base = base.base
    local_size = base.local_size if getattr(base, "local_crops", 0) else None
    backbone = build_backbone(run.model, run.data.size, local_size)
    return registry()[run.objective.name](backbone, run.objective, run.augmentation, run.data.size)

"""A short run on real images, CIFAR-10, to a kNN figure."""

import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.gpu.images import cifar10, on, shards
from benchmarks.gpu.part import Check, Row, installed, part
from benchmarks.gpu.throughput import FAST, dali_loader
from benchmarks.gpu.training import Training, torch_loader
from trainer.config import Data
from trainer.data.colour import colour
from trainer.data.views import Batch


@part(limit_s=200, needs=("timm",))
def cifar10_simclr(check: Check) -> Iterator[Row]:
    """CIFAR-10, SimCLR: ResNet-18, 10 epochs; kNN on the test images."""
    yield from _trained(check, "simclr_cifar10")


@part(limit_s=200, needs=("timm",))
def cifar10_care(check: Check) -> Iterator[Row]:
    """CIFAR-10, CARE with shared views: ResNet-18, 10 epochs; kNN on the test images."""
    yield from _trained(check, "care_cifar10")


def _trained(check: Check, recipe: str) -> Iterator[Row]:
    from trainer.evaluation.features import extract
    from trainer.evaluation.knn import knn_accuracy

    splits = cifar10(check.data, 512 if check.small else 50_000)
    batch, epochs = (64, 2) if check.small else (512, 10)
    training = Training(check, FAST | {"optimiser.name": "adam", "optimiser.lr": 1e-3, "data.batch_size": batch}, recipe)
    train = splits["train"]
    if installed("nvidia.dali"):
        loader, name = dali_loader(check, training, shards(*train, check.out / f"cifar10-{len(train[0])}")), "DALI"
    else:
        loader, name = torch_loader(training, *on(check.device, *train)), "torch on the device (no DALI)"

    def knn() -> float:
        bank, query = (
            extract(training.objective, _plain(check, training.run.data, *splits[split]))["full"] for split in ("train", "test")
        )
        return knn_accuracy(bank.values["plain"][0], bank.label, query.values["plain"][0], query.label)

    untrained, start = knn(), time.perf_counter()
    steps = epochs * loader.steps_per_epoch
    losses = training.losses(loader, steps)
    spent = time.perf_counter() - start
    trained = knn()
    ok = bool(losses.isfinite().all()) and (check.small or trained > untrained + 10)
    row = {"objective": training.run.objective.name, "images": len(train[0]), "epochs": epochs, "batch": batch, "loader": name}
    row |= {
        "s": spent,
        "images/s": steps * batch / spent,
        "first loss": float(losses[0]),
        "last loss": float(losses[-20:].mean()),
    }
    yield row | {"kNN % untrained": untrained, "kNN %": trained, "ok": ok}


def _plain(check: Check, data: Data, images: np.ndarray, label: np.ndarray) -> Iterator[Batch]:
    """The images as they are, normalised."""
    pixels, label = on(check.device, images, label)
    for index in torch.arange(len(pixels)).split(1000):
        views = {"plain": colour(pixels[index.to(check.device)], {}, data.mean, data.std)[None]}
        yield Batch(views, index, label[index])

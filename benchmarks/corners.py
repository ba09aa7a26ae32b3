"""Do the corners of a turned view tell its angle? R2 on unseen CIFAR-10 images, for each way to fill them.

    python benchmarks/corners.py [--shards DIR] [--seeds 3] [--json FILE]

Read is |sin 2 angle|, 0 where the border is parallel to the image's and 1 at 45 degrees, by least squares from the brightness
of the four corners (3 x 3 pixels) and its square, and by a small convolutional network from the corners themselves (8 x 8).
"""

import os
import platform
import statistics
import sys
from json import dumps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no installed package

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data_path import cifar10
from trainer.config import Augmentation
from trainer.data.loader import Loader
from trainer.data.shards import ShardFolder
from trainer.data.views import ViewSpec
from trainer.errors import exit_with_one_line

SIZE, BATCH, TRAIN, TEST, EPOCHS = 32, 500, 13000, 3000, 6


def benchmark(shards: str | None = None, seeds: int = 3, json: str | None = None) -> None:
    """Print R2, the median and the range over seeds.

    Args:
        shards: folder with a train split; default: CIFAR-10 of CARE_SHARED_DATA (or ../shared/data).
        seeds: of draws and network.
        json: file to write the numbers to as well.
    """
    folder = ShardFolder.open(Path(shards or cifar10()) / "train")
    numbers: dict[str, dict[str, list[float]]] = {}
    for corners in ("reflect", "inscribed", "zero"):
        numbers[corners] = {"linear": [], "network": []}
        for seed in range(seeds):
            views, turn = turned(folder, corners, seed)
            for name, read in (("linear", linear), ("network", network)):
                numbers[corners][name].append(explained(read(views, turn, seed), turn))
        for name, values in numbers[corners].items():
            print(f"{corners:10} {name:8} {statistics.median(values):6.3f} ({min(values):.3f} to {max(values):.3f})")
    if json:
        machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}"
        Path(json).write_text(dumps({"machine": machine, "images": folder.samples, "r2": numbers}, indent=1) + "\n")


def turned(folder: ShardFolder, corners: str, seed: int) -> tuple[Tensor, Tensor]:
    """Views [N, 3, S, S] turned by up to 90 degrees, colours as they are, and |sin 2 angle| [N]."""
    view = ViewSpec("v", 1, SIZE, Augmentation(rotation=90, corners=corners, jitter=0, grayscale=0, blur=0))
    loader = Loader(folder, [view], batch_size=BATCH, seed=seed, mean=(0.5,) * 3, std=(0.25,) * 3)
    batches = [next(loader) for _ in range((TRAIN + TEST) // BATCH)]
    angle = np.concatenate([batch.draws["v"]["angle"][0] for batch in batches])
    return torch.cat([batch.views["v"][0] for batch in batches]), torch.from_numpy(np.abs(np.sin(np.deg2rad(2 * angle))))


def explained(guess: Tensor, turn: Tensor) -> float:
    """R2 on the images that were not trained on."""
    return float(1 - (guess - turn[TRAIN:]).square().mean() / turn[TRAIN:].var())


def linear(views: Tensor, turn: Tensor, seed: int) -> Tensor:
    """What least squares guess for the test images."""
    brightness = corner(views, 3).unflatten(1, (4, 3)).mean((2, 3, 4))
    inputs = torch.cat([brightness, brightness**2, torch.ones(len(views), 1)], 1).double()
    return (inputs[TRAIN:] @ torch.linalg.lstsq(inputs[:TRAIN], turn[:TRAIN, None].double()).solution)[:, 0]


def network(views: Tensor, turn: Tensor, seed: int) -> Tensor:
    """What the network guesses for the test images after its last epoch."""
    torch.manual_seed(seed)
    patches = corner(views, 8)
    convolutions = [nn.Conv2d(12, 48, 3), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*convolutions, nn.Linear(48 * 16, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAIN).split(128):
            adam.zero_grad()
            (net(patches[rows]) - turn[rows]).square().mean().backward()
            adam.step()
    with torch.no_grad():
        return net(patches[TRAIN:])


def corner(views: Tensor, size: int) -> Tensor:
    """The four corners beside one another, [N, 4 * 3, size, size]."""
    ends = (slice(None, size), slice(-size, None))
    return torch.cat([views[:, :, y, x] for y in ends for x in ends], 1)


if __name__ == "__main__":
    exit_with_one_line(benchmark)

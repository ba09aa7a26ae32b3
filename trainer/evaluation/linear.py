"""Linear probe: how well a linear classifier on the frozen features tells the classes apart."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.config import Augmentation

LIGHT = Augmentation(jitter=0.0, grayscale=0.0, blur=0.0)  # what the probe trains under: random crop and flip


def linear_probe(
    train: Tensor,
    train_label: Tensor,
    tests: Mapping[str, Tensor],
    test_label: Tensor,
    *,
    epochs: int = 100,
    batch_size: int = 512,
    lr: float = 1e-3,
    weight_decay: float = 1e-6,
    seed: int = 0,
) -> dict[str, float]:
    """Top-1 accuracy of softmax regression on frozen features, with CARE's settings for CIFAR and STL-10.

    The last epoch's classifier is the one that is scored: nothing is chosen by looking at `tests`.

    Args:
        train: features [passes, N, D] of the training images under light augmentation; epoch e sees pass e mod passes.
        train_label: classes int64 [N].
        tests: features [M, D] of the test images by view: as they are, or transformed (`robustness.py`).
        test_label: classes int64 [M].
        epochs, batch_size, lr, weight_decay: of Adam at a constant rate.
        seed: of the initial weights and the order of the images.

    Returns: accuracy in per cent on each of `tests`.
    """
    std, mean = torch.std_mean(train.flatten(0, 1), dim=0)
    train = (train - mean) / std.clamp_min(1e-6)
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(train.shape[2], int(torch.maximum(train_label.max(), test_label.max())) + 1)
    nn.init.normal_(classifier.weight, std=0.01, generator=generator)
    nn.init.zeros_(classifier.bias)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=lr, weight_decay=weight_decay)
    for epoch in range(epochs):
        for rows in torch.randperm(train.shape[1], generator=generator).split(batch_size):
            optimiser.zero_grad()
            cross_entropy(classifier(train[epoch % len(train), rows]), train_label[rows]).backward()
            optimiser.step()
    with torch.inference_mode():
        guesses = {view: classifier((test - mean) / std.clamp_min(1e-6)).argmax(dim=1) for view, test in tests.items()}
    return {view: 100 * (guess == test_label).double().mean().item() for view, guess in guesses.items()}

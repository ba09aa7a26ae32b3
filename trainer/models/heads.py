"""Heads between the backbone and a loss."""

from torch import nn


def projector(features: int, hidden: int, out: int) -> nn.Sequential:
    """Linear (no bias), BatchNorm, ReLU, Linear: the projector of CARE's and SimCLR's CIFAR runs.

    Shape: [N, features] -> [N, out].
    """
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )

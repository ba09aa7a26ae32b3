"""Heads between the backbone and a loss: multi-layer perceptrons."""

from collections.abc import Callable

from torch import nn


def mlp(
    features: int,
    hidden: int,
    out: int,
    layers: int = 2,
    *,
    norm: bool = True,
    last_norm: bool = False,
    last_bias: bool = True,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """`layers` linear maps, all but the last followed by BatchNorm and activation. A map before a BatchNorm has no bias.

    Shape: [N, features] -> [N, out].

    Args:
        features, hidden, out: widths.
        layers: number of linear maps.
        norm: whether there are BatchNorms after the hidden ones.
        last_norm: end with a BatchNorm that has neither scale nor shift.
        last_bias: whether the last map has a bias where no BatchNorm follows.
        activation: makes the nonlinearity.
    """
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(features, hidden, bias=not norm), *([nn.BatchNorm1d(hidden)] if norm else []), activation()]
        features = hidden
    parts.append(nn.Linear(features, out, bias=last_bias and not last_norm))
    if last_norm:
        parts.append(nn.BatchNorm1d(out, affine=False))
    return nn.Sequential(*parts)

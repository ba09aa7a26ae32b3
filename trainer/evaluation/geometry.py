"""Geometry of the embedding: do transformations of the images act on it as rotations, and does it use its room.

Notation: `source` F [n, d] holds f(x) and `target` F_a [n, d] holds f(a x) of the same n images under ONE transformation a.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

NOISE = 1e-6  # displacement of unit vectors that float32 encoders show without any cause
EPS = 1e-8  # added to gamma's denominator, of the unit [length^4]
CHUNK = 512  # rows of the n x n pairs at a time


def wahba(source: Tensor, target: Tensor, proper: bool) -> float:
    """Root-mean-square distance that is left when the best rotation is taken out: min_R ||F R - F_a||_F / sqrt(n).

    CARE, sec. 5 (Wahba's problem), divided by sqrt(n). The residual is computed directly, not from the singular values.
    R has d(d-1)/2 free numbers, so that n must be well above d (4 d and more) for the residual to mean anything.

    Args:
        source, target: F and F_a, [n, d].
        proper: over SO(d), rotations only; else over O(d), reflections too. CARE's loss is zero under both.
    """
    source, target = source.double(), target.double()
    u, _, vh = torch.linalg.svd(source.T @ target)
    if proper and torch.linalg.det(u @ vh) < 0:
        u[:, -1] *= -1  # the cheapest way back: along the smallest singular value
    return ((source @ (u @ vh) - target).norm() / len(source) ** 0.5).item()


def displacement(source: Tensor, target: Tensor) -> float:
    """Root-mean-square displacement sqrt(mean_i ||f(a x_i) - f(x_i)||^2): 0 for an invariant encoder.

    This is our L_inv. It is `wahba` with R held at the identity, hence wahba <= displacement always. The paper's L_inv is
    another mean over other pairs, E ||f(a x) - f(a' x)|| with two transformations, which knows no such bound.
    """
    return ((target.double() - source.double()).norm() / len(source) ** 0.5).item()


def gamma(source: Tensor, target: Tensor) -> float:
    """Relative rotational equivariance gamma_f of CARE, sec. 5: the change of pairwise distances relative to the motion.

    Mean over ordered pairs i != j of (||y_i - y_j||^2 - ||x_i - x_j||^2)^2 / ((||y_i - x_i||^2 + ||y_j - x_j||^2)^2 + EPS),
    with x = f(x) and y = f(a x). 0 when a acts as a rotation or not at all; a collapsed encoder has 0 too, so
    that it is read beside the effective rank.

    Args:
        source, target: F and F_a, [n, d], n > 1.
    """
    source, target = source.double(), target.double()
    motion = (target - source).square().sum(dim=1)
    total = 0.0
    for start in range(0, len(source), CHUNK):
        rows = slice(start, start + CHUNK)
        change = _squared_distances(target, rows) - _squared_distances(source, rows)
        total += (change.square() / ((motion[rows, None] + motion).square() + EPS)).sum().item()
    return total / (len(source) * (len(source) - 1))


def effective_rank(embedding: Tensor) -> float:
    """Dimensions in use: exp of the entropy of the normalised singular values (Roy & Vetterli 2007) of centred rows [n, d].

    Between 1 and min(n - 1, d); 0 when all rows are one point up to rounding, nan where one is not finite.
    """
    rows = embedding.double()
    if not rows.isfinite().all():
        return float("nan")
    singular = torch.linalg.svdvals(rows - rows.mean(dim=0))
    singular = singular[singular > torch.finfo(embedding.dtype).eps * rows.norm()]
    share = singular / singular.sum()
    return share.pow(-share).prod().item() if len(share) else 0.0


def measure_motion(source: Tensor, targets: Tensor) -> dict[str, list[float]]:
    """Every measure of motion for every transformation.

    Args:
        source: F, [n, d].
        targets: F_a of each transformation a, [draws, n, d].

    Returns: one number a draw under each of wahba_so, wahba_o, l_inv, gamma, angle_std.
    """
    return {
        "wahba_so": [wahba(source, target, proper=True) for target in targets],
        "wahba_o": [wahba(source, target, proper=False) for target in targets],
        "l_inv": [displacement(source, target) for target in targets],
        "gamma": [gamma(source, target) for target in targets],
        "angle_std": [cosines(source, target).std().item() for target in targets],
    }


def unexplained(wahba_so: float, l_inv: float) -> float:
    """Share of the displacement that no rotation explains, in [0, 1]: 1 means that rotations explain nothing.

    An encoder that does not move has nothing to explain; it scores 1, so that collapse cannot look like equivariance.
    """
    return min(wahba_so / l_inv, 1.0) if l_inv > NOISE else 1.0


def cosines(source: Tensor, target: Tensor) -> Tensor:
    """Cosine of the angle between f(x) and f(a x) of every image, [n] in [-1, 1]."""
    return cosine_similarity(source.double(), target.double(), dim=1).clamp(-1, 1)


def recovery(train: Tensor, train_factor: Tensor, test: Tensor, test_factor: Tensor, ridge: float = 1e-3) -> float:
    """R^2 on held-out images of the ridge regression that reads a factor from the features.

    Args:
        train, test: features [N, D] and [M, D]; standardised here by the training images.
        train_factor, test_factor: the factor, [N, c] and [M, c]; c = 2 for a point on the circle.
        ridge: penalty, relative to the unit variance of a feature.

    Returns: 1 - (squared error / variance), both summed over the c columns; 0 for a factor that never varies; negative
        when the mean would do better.
    """
    std, mean = torch.std_mean(train.double(), dim=0)
    x, held_out = ((features.double() - mean) / std.clamp_min(1e-6) for features in (train, test))
    y, truth = train_factor.double(), test_factor.double()
    gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)) / len(x))
    error = (held_out @ weight + y.mean(dim=0) - truth).square().sum()
    variance = (truth - truth.mean(dim=0)).square().sum()
    return (1 - error / variance).item() if variance > 0 else 0.0


def _squared_distances(points: Tensor, rows: slice) -> Tensor:
    """Squared distances of points[rows] to all points, [rows, n]."""
    square = points.square().sum(dim=1)
    return square[rows, None] + square - 2 * points[rows] @ points.T

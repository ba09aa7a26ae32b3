"""The losses of the base methods, written from their papers' formulas, image by image. Slow on purpose; float64.

`p` are the online vectors of two views and `t` their targets, [2, N, d]. Where a method has no targets of its own, `t` is
not read.
"""

from torch import Tensor, stack


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def mean(values) -> Tensor:
    values = list(values)
    return sum(values) / len(values)


def softmax_loss(right: Tensor, wrong: list[Tensor]) -> Tensor:
    return -(right.exp() / (right.exp() + sum(w.exp() for w in wrong))).log()


def simclr(p: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, eq. 1."""
    n, z = p.shape[1], [*p[0], *p[1]]
    s = [[cosine(a, b) / temperature for b in z] for a in z]
    pairs = [(i, (i + n) % (2 * n)) for i in range(2 * n)]
    return mean(softmax_loss(s[i][j], [s[i][k] for k in range(2 * n) if k not in (i, j)]) for i, j in pairs)


def moco(p: Tensor, t: Tensor, temperature: float, queue: Tensor) -> Tensor:
    """He et al. 2020, eq. 1, for the queries of both views."""
    return mean(
        softmax_loss(cosine(q, k) / temperature, [cosine(q, old) / temperature for old in queue])
        for view, other in ((0, 1), (1, 0))
        for q, k in zip(p[view], t[other], strict=True)
    )


def moco_v3(p: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Chen, Xie, He 2021, algorithm 1: ctr(q1, k2) + ctr(q2, k1), each times 2 tau."""

    def ctr(queries: Tensor, keys: Tensor) -> Tensor:
        s = [[cosine(q, k) / temperature for k in keys] for q in queries]
        return 2 * temperature * mean(softmax_loss(row[i], [*row[:i], *row[i + 1 :]]) for i, row in enumerate(s))

    return ctr(p[0], t[1]) + ctr(p[1], t[0])


def byol(p: Tensor, t: Tensor) -> Tensor:
    """Grill et al. 2020, eq. 2: squared distance of normalised vectors, plus the same with the views exchanged."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return ((a / a.norm() - b / b.norm()) ** 2).sum()

    pairs = zip(*p, *t, strict=True)
    return mean(distance(p1, t2) + distance(p2, t1) for p1, p2, t1, t2 in pairs)


def simsiam(p: Tensor, t: Tensor) -> Tensor:
    """Chen, He 2021, eq. 2."""
    return mean(-cosine(p1, t2) / 2 - cosine(p2, t1) / 2 for p1, p2, t1, t2 in zip(*p, *t, strict=True))


def barlow(p: Tensor, t: Tensor, redundancy: float) -> Tensor:
    """Zbontar et al. 2021, eq. 1 and 2, of mean-centred embeddings; 1e-5 is the released BatchNorm's epsilon."""
    n, d = p.shape[1:]
    a, b = p[0] - p[0].sum(0) / n, p[1] - p[1].sum(0) / n
    total = 0
    for i in range(d):
        for j in range(d):
            scale = ((a[:, i] ** 2).sum() / n + 1e-5).sqrt() * ((b[:, j] ** 2).sum() / n + 1e-5).sqrt()
            c = (a[:, i] * b[:, j]).sum() / n / scale
            total = total + ((1 - c) ** 2 if i == j else redundancy * c**2)
    return total


def vicreg(p: Tensor, t: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """Bardes et al. 2022, eq. 1 to 6; the invariance term is a mean over dimensions too, as in algorithm 1."""
    n, d = p.shape[1:]
    s = mean(((a - b) ** 2).sum() / d for a, b in zip(*p, strict=True))
    v = c = 0
    for z in p:
        centred = z - z.sum(0) / n
        for i in range(d):
            deviation = ((centred[:, i] ** 2).sum() / (n - 1) + 1e-4).sqrt()
            v = v + (1 - deviation).clamp_min(0) / d
            c = c + sum(((centred[:, i] * centred[:, j]).sum() / (n - 1)) ** 2 for j in range(d) if j != i) / d
    return stack([invariance * s, variance * v, covariance * c]).sum()

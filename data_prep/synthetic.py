"""The embedded data set: drawn shapes whose factors are known.

The label is the shape. An image is a pure function of (seed, pool, number, size), drawn from its own Philox stream, so any
subset can be drawn in any order by any process. Edges are antialiased by signed distances (coverage of the pixel), which is
what supersampling converges to. Colours are HSV. Hue is what colour jitter changes: an invariant representation loses it.
"""

import numpy as np

FACTORS = ("hue", "orientation", "scale", "x", "y", "background")


def _points(x: np.ndarray, y: np.ndarray, points: int, inner: float) -> np.ndarray:
    """Star of `points` tips on the unit circle and notches at radius `inner`; inner = cos(pi / points) is the polygon."""
    half = np.pi / points
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)  # 0 at a tip, half at a notch
    radius = np.hypot(x, y)
    edge = np.array([np.cos(half) * inner - 1, np.sin(half) * inner])
    edge /= np.linalg.norm(edge)
    return (radius * np.cos(angle) - 1) * edge[1] - radius * np.sin(angle) * edge[0]


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(long - 0.95, short - 0.28)


# Signed distance to the outline, negative inside, of a shape of radius 1 at the origin; y points down.
# None looks the same after a turn of less than 72 degrees except circle and ring.
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.85,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) - 0.2,
    "half": lambda x, y: np.maximum(np.hypot(x, y) - 1, -y),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.5, y)),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.75,
    "triangle": lambda x, y: _points(x, y, 3, 0.5),
    "star": lambda x, y: _points(x, y, 5, 0.45),
    "cross": _cross,
}
CLASSES = tuple(SHAPES)


def draw(seed: int, pool: int, numbers: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images; image n shows the shape n mod 8.

    Args:
        seed: seed of the data set.
        pool: 0 for training images, 1 for test images: different images.
        numbers: which images, int [B].
        size: height and width, pixels.

    Returns: images uint8 [B, size, size, 3] and factors float64 [B, 6] in the order of FACTORS:
        hue of the shape in [0, 1), circular; orientation in turns, +-1/12 clockwise, never ambiguous; scale = radius over
        image size, 0.25 to 0.45; x and y of the centre over image size; background = brightness of the ground, 0.1 to 0.9.
    """
    unit = np.empty((len(numbers), 9))
    coarse = np.empty((len(numbers), 5, 5, 3), np.float32)
    noise = np.empty((len(numbers), size, size, 3), np.float32)
    for i, number in enumerate(numbers):
        stream = np.random.Generator(np.random.Philox(key=[seed, (pool << 48) | int(number)]))
        stream.random(out=unit[i])
        stream.standard_normal(out=coarse[i], dtype=np.float32)
        stream.standard_normal(out=noise[i], dtype=np.float32)
    factors = _factors(unit)
    tint = _rgb(np.stack([unit[:, 6], 0.5 * unit[:, 7], factors[:, 5]], 1))
    paint = _rgb(np.stack([factors[:, 0], np.full(len(unit), 0.85), 0.55 + 0.45 * unit[:, 8]], 1))

    ramp = np.clip(1 - abs(np.linspace(0, 4, size)[:, None] - np.arange(5)), 0, None).astype(np.float32)  # linear, [size, 5]
    texture = ramp @ np.einsum("wj,bijc->bciw", ramp, coarse)  # [B, 3, size, size]
    ground = tint[:, None, None] + 0.08 * texture.transpose(0, 2, 3, 1)
    cover = _coverage(numbers % len(SHAPES), factors, size)[..., None]
    image = ground + cover * (paint[:, None, None] - ground) + 0.04 * noise
    return (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8), factors


def _factors(unit: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) to factors; the whole shape stays inside the image."""
    scale = 0.25 + 0.2 * unit[:, 2]
    x, y = (scale + (1 - 2 * scale) * unit[:, i] for i in (3, 4))
    return np.stack([unit[:, 0], (unit[:, 1] - 0.5) / 6, scale, x, y, 0.1 + 0.8 * unit[:, 5]], 1)


def _coverage(labels: np.ndarray, factors: np.ndarray, size: int) -> np.ndarray:
    """Share of each pixel that the shape covers, float32 [B, size, size]."""
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    _, orientation, scale, x, y, _ = factors.T.astype(np.float32)[:, :, None, None]
    dx, dy = (grid - x) / scale, (grid[:, None] - y) / scale
    cos, sin = np.cos(2 * np.pi * orientation), np.sin(2 * np.pi * orientation)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    cover = np.empty((len(labels), size, size), np.float32)
    for label, distance in enumerate(SHAPES.values()):
        rows = labels == label
        cover[rows] = np.clip(0.5 - distance(u[rows], v[rows]) * scale[rows] * size, 0, 1)
    return cover


def _rgb(hsv: np.ndarray) -> np.ndarray:
    """HSV to RGB, both in [0, 1], float32 [B, 3]."""
    hue, saturation, value = hsv.T[:, :, None]
    sector = (np.array([5, 3, 1]) + 6 * hue) % 6
    return (value * (1 - saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))).astype(np.float32)

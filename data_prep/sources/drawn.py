"""The drawn images of data_prep/synthetic.py as a source."""

from collections.abc import Iterator

import numpy as np

from data_prep import synthetic
from data_prep.sources.encoding import png
from data_prep.sources.source import Images, Options, Sample, Source


class SyntheticImages(Images):
    """Drawn when they are read."""

    def __init__(self, seed: int, pool: int, samples: int, size: int) -> None:
        self.labels = np.arange(samples) % len(synthetic.CLASSES)
        self._about = (seed, pool, size)

    def read(self, numbers: np.ndarray) -> Iterator[Sample]:
        """Draw 64 at a time: numpy is then busy with pixels, not with calls."""
        seed, pool, size = self._about
        for begin in range(0, len(numbers), 64):
            chunk = numbers[begin : begin + 64]
            for number, image, factors in zip(chunk, *synthetic.draw(seed, pool, chunk, size), strict=True):
                named = dict(zip(synthetic.FACTORS, np.round(factors, 6).tolist(), strict=True))
                yield Sample(png(image), int(self.labels[number]), (size, size), named)


def open_drawn(options: Options) -> Source:
    """`samples` drawings for training, and a tenth more for the test."""
    seed, samples, size = options.seed, options.samples, options.size
    return Source(
        train=SyntheticImages(seed, 0, samples, size),
        test=SyntheticImages(seed, 1, samples // 10, size),
        classes=list(synthetic.CLASSES),
        image_extension="png",
        fingerprint=f"{samples} drawings of {size} pixels",
        factors=list(synthetic.FACTORS),
    )

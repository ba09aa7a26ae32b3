"""Images in files, for the tests of sources."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import synthetic


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with 3 classes of 8 jpg images."""
    images, _ = synthetic.draw(3, 0, np.arange(24), 40)
    for i, image in enumerate(images):
        path = tmp_path / "photographs" / "abc"[i % 3] / f"image {i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=90)
    return tmp_path / "photographs"

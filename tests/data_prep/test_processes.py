"""The bar that a user watches for hours."""

import io
import time

import pytest
from rich.console import Console

from data_prep import processes


def test_the_bar_tells_images_and_shards_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(processes, "console", Console(file=screen, force_terminal=True, width=160))
    processes.run("writing", 1, lambda: time.sleep(0.02), [()] * 30, [1000] * 30)
    speeds = [line.partition(" images/s, ") for line in screen.getvalue().splitlines() if "shards/s" in line]
    assert speeds
    images, _, shards = speeds[-1]
    found = float(images.split("images")[-1].replace(",", "")), float(shards.split(" shards/s")[0])
    assert found[0] == pytest.approx(1000 * found[1], rel=0.01)
    assert 0.5 < found[1] < 50

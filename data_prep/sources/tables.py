"""What tables of images have in common: columns found by name, labels as they are written, rows of several splits."""

import difflib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.sources.source import Images
from trainer.errors import UserError

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}  # as written -> ours
UNLABELLED = ("", "-1")
MOST_CLASSES = 1_000_000


def check_column(name: str, columns: list[str], flag: str, where: Path) -> str:
    """The name, if there is such a column."""
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
        hint = f"Did you mean --{flag} {near[0]}?" if near else f"Name it by --{flag}."
        hint += " Or add --unlabelled." if flag == "label_column" else ""
        raise UserError(f"{where} has no column {name!r}", f"one of {', '.join(columns)}", hint)
    return name


class Labels:
    """Labels as they are written: coded as they appear, numbered when all are known."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._places: list[str] = []

    def code(self, label: str, place: str) -> int:
        """What stands for the label until then; `place` tells where it stands."""
        if label not in self._codes:
            if len(self._codes) == MOST_CLASSES:
                raise UserError(
                    f"more than {MOST_CLASSES:,} different labels", "one for each class", "Name another --label_column."
                )
            self._codes[label] = len(self._codes)
            self._places.append(place)
        return self._codes[label]

    def number(self, known: list[str] | None = None) -> tuple[np.ndarray, list[str] | None]:
        """The label of each code, int64, and the names of the classes: sorted. Whole numbers stay what they are.

        Args:
            known: names of the classes that numbers stand for.

        Raises:
            UserError: some are numbers and some are names; a number is too large.
        """
        names = sorted(set(self._codes) - set(UNLABELLED))
        numbers = [name for name in names if name.isascii() and name.isdigit() and len(name) < 10]
        if numbers and len(numbers) < len(names):
            either = (numbers[0], min(set(names) - set(numbers)))
            found = " and ".join(f"label {name!r} in {self._places[self._codes[name]]}" for name in either)
            raise UserError(found, "numbers everywhere, or names everywhere", "Correct the labels.")
        label = {name: int(name) if numbers else i for i, name in enumerate(names)}
        largest = max(names, key=label.__getitem__, default="")
        limit = MOST_CLASSES if known is None else len(known)
        if label.get(largest, 0) >= limit:
            place = self._places[self._codes[largest]]
            raise UserError(f"label {largest} in {place}", f"numbers below {limit:,}", "Correct the labels.")
        if numbers:
            names = known or [str(number) for number in range(label[largest] + 1)]
        return np.array([label.get(name, -1) for name in self._codes], np.int64), names or None


def held_out(pools: Mapping[str, Images], where: Path) -> dict[str, Images | None]:
    """The pools of a Source by name.

    Where there is one held-out split it is the test. ImageNet's test has no labels and measures nothing: val takes its place.
    """
    if "train" not in pools or not len(pools["train"].labels):
        raise UserError(f"no training images in {where}, only {', '.join(pools)}", "some", "Name their split train.")
    val, test = pools.get("val"), pools.get("test")
    if val is not None and (test is None or ((test.labels < 0).all() and (val.labels >= 0).any())):
        val, test = None, val
    return {"train": pools["train"], "val": val, "test": test}

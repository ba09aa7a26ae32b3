"""Image files that a CSV file lists: a header, then a path, a label and perhaps a split on each line."""

import csv
import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.sources.encoding import kind_of, majority
from data_prep.sources.folder import FileImages
from data_prep.sources.names import Names
from data_prep.sources.source import Options, Source
from data_prep.sources.tables import SPLITS, Labels, check_column, held_out
from trainer.errors import UserError


class ListedImages(FileImages):
    """Files that a CSV file lists, each with the line that names it."""

    def __init__(self, root: Path, listed: "_Listed", labels: np.ndarray, extension: str, manifest: Path) -> None:
        super().__init__(root, listed.names, labels, extension)
        self._lines, self._manifest = listed.lines, manifest

    def describe(self, number: int) -> str:
        """Line and path."""
        return f"{self._manifest} line {self._lines[number]}: {super().describe(number)}"


@dataclass
class _Listed:
    """The rows of one split, packed."""

    names: Names = field(default_factory=Names)
    codes: array = field(default_factory=lambda: array("l"))
    lines: array = field(default_factory=lambda: array("l"))


def open_csv(options: Options) -> Source:
    """The columns are `path`, `label` and, if there, `split`; paths are relative to the CSV file, or to --root.

    The files are not looked at before they are read, and the fingerprint is that of the list.

    Raises:
        UserError: no such column; a row of another length, of an unknown split, or whose path leads out of the root.
    """
    manifest = options.manifest
    if manifest is None or not manifest.is_file():
        raise UserError(f"--manifest is {manifest}", "a CSV file with the columns path and label", "Give its path.")
    root = options.root or manifest.parent
    labels, kinds, listed = Labels(), Counter[str | None](), dict[str, _Listed]()
    digest = hashlib.sha256()
    for line, path, label, split in _rows(manifest, os.path.join(os.path.abspath(root), ""), options):
        rows = listed.setdefault(split, _Listed())
        rows.names.append(path)
        rows.codes.append(labels.code(label, f"{manifest} line {line}"))
        rows.lines.append(line)
        kinds[kind_of(path)] += 1
        digest.update(f"{(path, label, split)}".encode())
    if not listed:
        raise UserError(f"{manifest} lists no images", "a line for each", "Correct --manifest.")
    numbers, classes = labels.number()
    extension = majority(kinds)
    pools = {
        split: ListedImages(root, rows, numbers[np.array(rows.codes)], extension, manifest) for split, rows in listed.items()
    }
    return Source(**held_out(pools, manifest), classes=classes, image_extension=extension, fingerprint=digest.hexdigest())


def _rows(manifest: Path, root: str, options: Options) -> Iterator[tuple[int, str, str, str]]:
    """Line number, path relative to the root, label ("" for none) and split of every row."""
    with manifest.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            if not header:
                raise UserError(f"{manifest} is empty", "a header and a line for each image", "Correct --manifest.")
            path_at = header.index(check_column(options.image_column or "path", header, "image_column", manifest))
            label_at = None
            if not options.unlabelled:
                label_at = header.index(check_column(options.label_column or "label", header, "label_column", manifest))
            split_at = header.index("split") if "split" in header else None
            for row in rows:
                if not row:
                    continue
                place = f"{manifest} line {rows.line_num}"
                if len(row) != len(header):
                    raise UserError(f"{place} has {len(row)} fields", f"{len(header)}, as the header", "Correct the line.")
                split = "train" if split_at is None else SPLITS.get(row[split_at], "")
                if not split:
                    raise UserError(f"{place}: split {row[split_at]!r}", f"one of {', '.join(SPLITS)}", "Correct the line.")
                label = "" if label_at is None else row[label_at].strip()
                yield rows.line_num, _below(root, row[path_at], place), label, split
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{manifest} after line {rows.line_num}: {error}", "CSV text in UTF-8", "Correct it.") from error


def _below(root: str, path: str, place: str) -> str:
    """The path relative to the root ("/", "/DIR/"): a manifest from elsewhere does not read what lies outside."""
    full = os.path.normpath(os.path.join(root, path))
    if not full.startswith(root):
        found = f"{place}: {path!r} is not below {root}" if path else f"{place} has no path"
        raise UserError(found, "the path of a file below --root", "Correct it, or give the --root that holds every file.")
    return full[len(root) :]

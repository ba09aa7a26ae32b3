"""Parquet files, as the Hugging Face hub keeps data sets: a column of encoded images and one of labels."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.encoding import kind_in, majority, stored
from data_prep.sources.source import Bad, Images, Options, Sample, Source
from data_prep.sources.tables import SPLITS, Labels, check_column, held_out
from trainer.errors import UserError

PROBES = 32  # images that are looked at to choose what to store
READING = {"pre_buffer": False, "buffer_size": 1 << 20}  # no threads, which a fork loses; no whole row group in memory


@dataclass(frozen=True)
class _File:
    """One file.

    Args:
        path: where it is.
        column: of the images, "NAME" if binary or "NAME.bytes" if a struct.
        names: of the classes, None if the file does not say.
        rows: images of each row group.
        codes: of the labels, int32 [N].
    """

    path: Path
    column: str
    names: list[str] | None
    rows: list[int]
    codes: np.ndarray


class ParquetImages(Images):
    """Rows of several files; a block is a row group.

    Args:
        files: in the order of the numbers.
        labels: int64 [N].
        extension: of the images to store; others are re-encoded, without loss but for jpg.
    """

    def __init__(self, files: list[_File], labels: np.ndarray, extension: str) -> None:
        self.labels, self.blocks = labels, np.cumsum([rows for file in files for rows in file.rows])
        self._paths, self._column = [file.path for file in files], files[0].column
        self._first_block = np.cumsum([0, *(len(file.rows) for file in files)])
        self._first_number = np.cumsum([0, *(len(file.codes) for file in files)])
        self._extension = extension

    def read(self, numbers: np.ndarray) -> Iterator[Sample | Bad]:
        """Read each row group once; from then on its images among these are in memory, encoded."""
        blocks = np.searchsorted(self.blocks, numbers, side="right")
        encoded: dict[int, bytes | None] = {}
        unreadable: dict[int, Exception] = {}
        for block in np.unique(blocks):
            try:
                encoded |= self._fetch(int(block), numbers[blocks == block])
            except (OSError, pa.ArrowException) as error:
                unreadable[block] = error
        for number, block in zip(numbers.tolist(), blocks, strict=True):
            try:
                if block in unreadable:
                    raise ValueError(f"unreadable row group: {unreadable[block]}")
                data, shape = stored(encoded.pop(number) or b"", None, self._extension)
                yield Sample(data, int(self.labels[number]), shape)
            except (OSError, ValueError) as error:
                file = _last(self._first_number, number)
                yield Bad(number, f"{self._paths[file]} row {number - self._first_number[file]}", f"({error})")

    def _fetch(self, block: int, numbers: np.ndarray) -> dict[int, bytes | None]:
        """These images of one row group, encoded."""
        file = _last(self._first_block, block)
        group = _images(self._paths[file], block - int(self._first_block[file]), self._column)
        first, wanted = int(self.blocks[block - 1]) if block else 0, set(numbers.tolist())
        rows = enumerate(islice(group, max(wanted) + 1 - first), first)
        return {number: value.as_py() for number, value in rows if number in wanted}


def open_parquet(options: Options) -> Source:
    """Every *.parquet below ROOT; the words train, val, validation and test in its path tell its split.

    Raises:
        UserError: no such files or columns, a column of another type, files that differ in their classes.
    """
    root = options.root
    labels = Labels()
    files = [(split, _open(path, options, labels)) for split, path in _find(root)]
    first = files[0][1]
    for _, file in files:
        if (file.column, file.names) != (first.column, first.names):
            found = f"{file.path} has other image or class features than {first.path}"
            raise UserError(found, "one data set", "Name the folder of one by --root.")
    numbers, classes = labels.number(first.names)
    extension = majority(Counter(map(kind_in, _probe([file for _, file in files]))))
    pools = {}
    for name in dict(files):
        pool = [file for split, file in files if split == name]
        pools[name] = ParquetImages(pool, np.concatenate([numbers[file.codes] for file in pool]), extension)
    digest = hashlib.sha256(repr((first.column, classes)).encode())
    for split, file in files:
        digest.update(repr((split, str(file.path.relative_to(root)), file.path.stat().st_size, file.rows)).encode())
        digest.update(numbers[file.codes])
    return Source(**held_out(pools, root), classes=classes, image_extension=extension, fingerprint=digest.hexdigest())


def _find(root: Path) -> list[tuple[str, Path]]:
    """Split and path of every file, sorted; without any split all are for training."""
    names = sorted(path.relative_to(root) for path in root.rglob("*.parquet"))
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise UserError(f"no *.parquet below {root}", "data/train-*.parquet, for example", "Correct --root.")
    said = {name: [word for word in re.findall("[a-z]+", str(name).lower()) if word in SPLITS] for name in names}
    if any(said.values()) and not all(said.values()):
        odd = next(name for name in names if not said[name])
        raise UserError(f"{root / odd} is of no split", f"one of {', '.join(SPLITS)} in its path", "Rename or remove it.")
    return [(SPLITS[said[name][-1]] if said[name] else "train", root / name) for name in names]


def _open(path: Path, options: Options, labels: Labels) -> _File:
    """Read the schema, the sizes of the row groups and the labels."""
    try:
        with pq.ParquetFile(path, **READING) as file:
            schema, groups = file.schema_arrow, file.metadata
            rows = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
            image = check_column(options.image_column or "image", schema.names, "image_column", path)
            column = _image_column(schema.field(image), path)
            if options.unlabelled:
                return _File(path, column, None, rows, np.full(sum(rows), labels.code("", str(path)), np.int32))
            label = check_column(options.label_column or "label", schema.names, "label_column", path)
            codes = _label_codes(file, schema.field(label), labels, path)
            about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            return _File(path, column, about.get("info", {}).get("features", {}).get(label, {}).get("names"), rows, codes)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error})", "a Parquet file", "Download it again.") from error


def _image_column(field: pa.Field, path: Path) -> str:
    """What to read of the column, which holds bytes or a struct of `bytes` and `path`."""
    kind, column = field.type, field.name
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, column = kind.field("bytes").type, f"{column}.bytes"
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        found = f"column {field.name!r} of {path} holds {field.type}"
        raise UserError(found, "encoded images, binary or struct<bytes, path>", "Name another --image_column.")
    return column


def _label_codes(file: pq.ParquetFile, field: pa.Field, labels: Labels, path: Path) -> np.ndarray:
    """The code of every row's label, int32 [N]."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        found = f"column {field.name!r} of {path} holds {field.type}"
        raise UserError(found, "whole numbers or names", "Name another --label_column, or add --unlabelled.")
    codes, row = [np.empty(0, np.int32)], 0
    for batch in file.iter_batches(columns=[field.name], use_threads=False):
        values = batch.column(0).cast(kind).dictionary_encode("encode")  # in the order of appearance
        rows = values.indices.to_numpy()
        _, seen = np.unique(rows, return_index=True)
        written = ["" if value is None else str(value) for value in values.dictionary.to_pylist()]
        coded = [labels.code(label, f"{path} row {row + at}") for label, at in zip(written, seen, strict=True)]
        codes.append(np.array(coded, np.int32)[rows])
        row += len(batch)
    return np.concatenate(codes)


def _probe(files: list[_File]) -> Iterator[bytes]:
    """The first images of some row groups, spread over the files."""
    groups = [(file, group) for file in files for group, rows in enumerate(file.rows) if rows]
    for file, group in groups[:: len(groups) // PROBES + 1]:
        try:
            yield next(_images(file.path, group, file.column)).as_py() or b""
        except (OSError, pa.ArrowException):
            continue  # told with its row when it is read


def _images(path: Path, group: int, column: str) -> Iterator[pa.Scalar]:
    """The images of one row group, encoded."""
    with pq.ParquetFile(path, **READING) as file:
        for batch in file.iter_batches(64, [group], [column], use_threads=False):
            values = batch.column(0)
            yield from values.field("bytes") if pa.types.is_struct(values.type) else values


def _last(firsts: np.ndarray, value: int) -> int:
    """Which range holds the value, by the first of each."""
    return int(np.searchsorted(firsts, value, side="right")) - 1

"""Parquet files as the Hugging Face hub lays them out, against what pyarrow reads from them whole."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored import encoded, files

from data_prep.make_shards import make
from data_prep.sources import open_source
from data_prep.sources.source import Bad, Options
from trainer.data.shards import ShardFolder
from trainer.errors import UserError

NAMES = ["cat", "ant", "bee"]  # not sorted: a ClassLabel's order is its own
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def jpegs(photographs: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(photographs.rglob("*.jpg"))]


def write(path: Path, images: list[bytes | None], labels: pa.Array | list, names: list[str] | None = NAMES) -> Path:
    """A file as `datasets` writes it: small row groups, the features in the schema's metadata."""
    column = pa.array([None if image is None else {"bytes": image, "path": None} for image in images], STRUCT)
    table = pa.table({"image": column, "label": labels})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


def test_rows_are_stored_byte_for_byte_with_the_classes_of_the_hub(jpegs: list[bytes], tmp_path: Path) -> None:
    labels = [i % 3 for i in range(24)]
    for part, rows in {"train-00000-of-00002-a1": slice(0, 8), "train-00001-of-00002-b2": slice(8, 15)}.items():
        write(tmp_path / "in/data" / f"{part}.parquet", jpegs[rows], labels[rows])
    write(tmp_path / "in/data/validation-00000-of-00001.parquet", jpegs[15:20], labels[15:20])
    write(tmp_path / "in/data/test-00000-of-00001.parquet", jpegs[20:], labels[20:])
    for workers in (1, 2):
        make("parquet", str(tmp_path / "in"), str(tmp_path / str(workers)), shard_size=4, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        table = pa.concat_tables(map(pq.read_table, (tmp_path / "in/data").glob(f"{name}-*")))
        expected = {row["image"]["bytes"]: row["label"] for row in table.to_pylist()}
        assert encoded(tmp_path / "1" / split) == expected
        assert ShardFolder.open(tmp_path / "1" / split).classes == tuple(NAMES)


@pytest.mark.parametrize(
    ("labels", "classes", "first"),
    [
        (pa.array([2, 0, None, 2], pa.int8()), ("0", "1", "2"), [2, 0, -1, 2]),
        (pa.array(["wasp", "ant", "wasp", ""]), ("ant", "wasp"), [1, 0, 1, -1]),
        (pa.array(["10", "9", "10", "0"]).dictionary_encode(), tuple(map(str, range(11))), [10, 9, 10, 0]),
        (pa.array([-1, -1, -1, -1]), None, [-1] * 4),
    ],
    ids=["numbers", "names", "numbers as text", "none"],
)
def test_labels_are_numbers_or_names(
    labels: pa.Array, classes: tuple | None, first: list[int], jpegs: list[bytes], tmp_path: Path
) -> None:
    """Of a column and an image column that have other names and a binary one; one file that names no split."""
    table = pa.table({"img": jpegs[:4], "fine": labels})
    pq.write_table(table, tmp_path / "part.parquet")
    settings = {"image_column": "img", "label_column": "fine", "validation": 0, "workers": 1}
    make("parquet", str(tmp_path), str(tmp_path / "out"), **settings)
    assert encoded(tmp_path / "out/train") == dict(zip(jpegs, first, strict=False))
    assert ShardFolder.open(tmp_path / "out/train").classes == classes


def test_a_test_set_without_labels_leaves_its_place_to_validation(jpegs: list[bytes], tmp_path: Path) -> None:
    """ImageNet's labels of the test images are secret, -1 on the hub."""
    for split, rows in {"train": slice(0, 16), "validation": slice(16, 20), "test": slice(20, 24)}.items():
        write(tmp_path / "in" / split / "0000.parquet", jpegs[rows], [-1 if split == "test" else 1] * len(jpegs[rows]))
    make("parquet", str(tmp_path / "in"), str(tmp_path / "out"), validation=0.25, workers=1)
    assert encoded(tmp_path / "out/test") == dict.fromkeys(jpegs[16:20], 1)
    assert encoded(tmp_path / "out/train") | encoded(tmp_path / "out/val") == dict.fromkeys(jpegs[:16], 1)


def test_unlabelled_needs_no_label_column(jpegs: list[bytes], tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": jpegs}), tmp_path / "images.parquet", row_group_size=5)
    make("parquet", str(tmp_path), str(tmp_path / "out"), unlabelled=True, validation=0.25, workers=1)
    assert encoded(tmp_path / "out/train") | encoded(tmp_path / "out/val") == dict.fromkeys(jpegs, -1)
    assert ShardFolder.open(tmp_path / "out/train").classes is None


def test_other_kinds_are_re_encoded_to_the_most_frequent(photographs: Path, tmp_path: Path) -> None:
    import io

    from PIL import Image

    buffers = []
    for i, path in enumerate(sorted(photographs.rglob("*.jpg"))[:12]):
        buffers.append(io.BytesIO())
        Image.open(path).save(buffers[-1], "BMP" if i % 3 else "PNG")
    write(tmp_path / "train.parquet", [buffer.getvalue() for buffer in buffers], [0] * 12)
    make("parquet", str(tmp_path), str(tmp_path / "out"), validation=0, workers=1)
    assert ShardFolder.open(tmp_path / "out/train").image_extension == "png"
    expected = {np.asarray(Image.open(buffer)).tobytes() for buffer in buffers}
    assert {np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in encoded(tmp_path / "out/train")} == expected


def test_bad_images_are_named_by_file_and_row_and_can_be_left_out(jpegs: list[bytes], tmp_path: Path) -> None:
    for rows, name in (([*jpegs[:4], jpegs[4][:-300]], "a"), ([*jpegs[5:10], None, b"", b"<html>", *jpegs[10:20]], "b")):
        write(tmp_path / f"train-{name}.parquet", rows, [0] * len(rows))
    broken = tmp_path / "train-b.parquet"
    group = pq.ParquetFile(broken).metadata.row_group(4).column(0)  # rows 12 to 14
    data = bytearray(broken.read_bytes())
    data[group.data_page_offset : group.data_page_offset + 40] = bytes(40)
    broken.write_bytes(data)
    with pytest.raises(UserError, match=r"7 bad images: .*train-[ab].parquet row \d+ \("):
        make("parquet", str(tmp_path), str(tmp_path / "out"), validation=0, workers=1)
    assert not files(tmp_path / "out")
    source = open_source("parquet", Options(tmp_path, 0, 0, 0))
    reasons = [str(found) for found in source.train.read(np.arange(23)) if isinstance(found, Bad)]
    expected = {"a.parquet row 4": "corrupt", "b.parquet row 5": "no bytes", "b.parquet row 6": "no bytes"}
    expected |= {"b.parquet row 7": "not an image"} | {f"b.parquet row {i}": "unreadable row group" for i in (12, 13, 14)}
    for reason, (row, why) in zip(reasons, expected.items(), strict=True):
        assert f"{tmp_path}/train-{row} ({why}" in reason
    make("parquet", str(tmp_path), str(tmp_path / "out"), validation=0, workers=1, skip_bad=True)
    assert encoded(tmp_path / "out/train") == dict.fromkeys([*jpegs[:4], *jpegs[5:14], *jpegs[17:20]], 0)


def spoilt(case: str, root: Path, jpegs: list[bytes]) -> dict[str, str]:
    """Files of one kind of mistake; returns the flags."""
    two, flags = jpegs[:2], {}
    if case == "column":
        pq.write_table(pa.table({"img": two, "fine_label": [0, 1]}), root / "a.parquet")
    elif case == "label column":
        pq.write_table(pa.table({"image": two, "labels": [0, 1]}), root / "a.parquet")
    elif case == "image type":
        pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"], "label": [0, 1]}), root / "a.parquet")
    elif case == "label type":
        write(root / "a.parquet", two, [0.5, 1.0])
    elif case == "mixed":
        write(root / "a.parquet", two, ["ant", "7"], None)
    elif case == "too large":
        write(root / "a.parquet", two, [0, 3])
    elif case == "other classes":
        write(root / "a.parquet", two, [0, 1])
        write(root / "b.parquet", two, [0, 1], ["x", "y"])
    elif case == "no split":
        write(root / "train.parquet", two, [0, 1])
        write(root / "more.parquet", two, [0, 1])
    elif case == "cut":
        path = write(root / "a.parquet", two, [0, 1])
        path.write_bytes(path.read_bytes()[:-9])
    elif case == "flag":
        write(root / "a.parquet", two, [0, 1])
        flags = {"manifest": "list.csv"}
    elif case == "only a test":
        write(root / "test.parquet", two, [0, 1])
        write(root / "val.parquet", two, [0, 1])
    return flags


@pytest.mark.parametrize(
    ("case", "said"),
    {
        "none": r"no \*\.parquet below .*data/train-\*\.parquet",
        "column": r"a\.parquet has no column 'image'; expected one of img, fine_label\. Did you mean --image_column img\?",
        "label column": r"no column 'label'.*Did you mean --label_column labels\? Or add --unlabelled",
        "image type": r"column 'image' of .*a\.parquet holds string; expected encoded images",
        "label type": r"column 'label' of .*a\.parquet holds double; expected whole numbers or names",
        "mixed": r"label '7' in .*a\.parquet row 1 and label 'ant' in .*a\.parquet row 0; expected numbers everywhere",
        "too large": r"label 3 in .*a\.parquet row 1; expected numbers below 3",
        "other classes": r"b\.parquet has other image or class features than .*a\.parquet",
        "no split": r"more\.parquet is of no split; expected one of train, val, validation, test in its path",
        "cut": r"a\.parquet cannot be read \(.*expected a Parquet file",
        "flag": r"--manifest with --source parquet; expected csv",
        "only a test": r"no training images in .*only test, val",
    }.items(),
)
def test_mistakes_are_told_in_one_line(case: str, said: str, jpegs: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    flags = spoilt(case, tmp_path / "in", jpegs)
    with pytest.raises(UserError, match=said) as error:
        make("parquet", str(tmp_path / "in"), str(tmp_path / "out"), workers=1, **flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()

"""CSV manifests: every file that is listed, with its label, from where it lies."""

import csv
import shutil
from pathlib import Path

import pytest
from stored import encoded, files

from data_prep.make_shards import make
from trainer.data.shards import ShardFolder
from trainer.errors import UserError


def write(path: Path, *rows: list[str], header: str = "path,label") -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return str(path)


def test_files_are_stored_byte_for_byte_with_their_labels_and_splits(photographs: Path, tmp_path: Path) -> None:
    """Names of all sorts, relative to the manifest; a file may be listed in two ways that only the split tells."""
    odd = photographs / 'a/comma, "quote"\nand line.jpg'
    (photographs / "a/image 0.jpg").rename(odd)
    paths = sorted(photographs.rglob("*.jpg"))
    splits = ["test" if i % 4 == 3 else "validation" if i % 4 == 2 else "train" for i in range(24)]
    rows = [[split, path.parent.name * 2, str(path.relative_to(tmp_path))] for split, path in zip(splits, paths, strict=True)]
    manifest = write(tmp_path / "list.csv", *rows, header="split,label,path")
    for workers in (1, 2):
        make("csv", out=str(tmp_path / str(workers)), manifest=manifest, shard_size=4, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        expected = {
            path.read_bytes(): "abc".index(path.parent.name) for path, s in zip(paths, splits, strict=True) if s == name
        }
        assert encoded(tmp_path / "1" / split) == expected
        assert ShardFolder.open(tmp_path / "1" / split).classes == ("aa", "bb", "cc")


def test_paths_are_relative_to_root_or_absolute_below_it(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    rows = [["b/../a/image 0.jpg", "7"], [f"{photographs}/a/image 3.jpg", "-1"], ["./b//image 1.jpg", ""]]
    manifest = write(tmp_path / "elsewhere/list.csv", *rows, header="file,class")
    flags = {"image_column": "file", "label_column": "class", "validation": 0, "workers": 1}
    make("csv", str(photographs), str(tmp_path / "out"), manifest=manifest, **flags)
    expected = {"a/image 0.jpg": 7, "a/image 3.jpg": -1, "b/image 1.jpg": -1}
    assert encoded(tmp_path / "out/train") == {(photographs / name).read_bytes(): label for name, label in expected.items()}
    assert ShardFolder.open(tmp_path / "out/train").classes == tuple("01234567")


def test_unlabelled_needs_no_label_column(photographs: Path, tmp_path: Path) -> None:
    manifest = write(photographs / "list.csv", ["a/image 0.jpg"], ["b/image 1.jpg"], header="\ufeffpath")
    make("csv", out=str(tmp_path / "out"), manifest=manifest, unlabelled=True, validation=0, workers=1)
    assert list(encoded(tmp_path / "out/train").values()) == [-1, -1]
    assert ShardFolder.open(tmp_path / "out/train").classes is None


def test_files_that_are_missing_or_bad_are_named_with_their_line(photographs: Path, tmp_path: Path) -> None:
    (photographs / "a/text.jpg").write_text("<html>")
    shutil.copy(photographs / "a/image 0.jpg", photographs / "a/notes.txt")
    rows = [["a/image 0.jpg", "x"], ["a/lost.jpg", "x"], ["a/text.jpg", "x"], ["a/notes.txt", "x"]]
    settings = {"manifest": write(photographs / "list.csv", *rows), "validation": 0, "workers": 1}
    with pytest.raises(UserError, match="3 bad images") as error:
        make("csv", out=str(tmp_path / "out"), **settings)
    said = str(error.value)
    for line, name, reason in ((3, "lost.jpg", "No such file"), (4, "text.jpg", "not an image"), (5, "notes.txt", "not named")):
        assert f"list.csv line {line}: {photographs}/a/{name} ({reason}" in said
    make("csv", out=str(tmp_path / "out"), skip_bad=True, **settings)
    assert len(encoded(tmp_path / "out/train")) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "": r"list\.csv is empty; expected a header",
        "path,label\n": r"list\.csv lists no images",
        "file,label\na,1\n": r"list\.csv has no column 'path'; expected one of file, label\. Name it by --image_column",
        "path,labels\na,1\n": r"no column 'label'; .*Did you mean --label_column labels\? Or add --unlabelled",
        "path,label\na.jpg,1\n\nb.jpg\n": r"line 4 has 1 fields; expected 2, as the header",
        "path,label\na.jpg,cat\nb.jpg,3\n": r"label '3' in .*list\.csv line 3 and label 'cat' in .*list\.csv line 2",
        "path,label\na.jpg,5000000\n": r"label 5000000 in .*line 2; expected numbers below 1,000,000",
        "path,label\n../../etc/passwd,1\n": r"line 2: '../../etc/passwd' is not below .*expected the path of a file below",
        "path,label\n/etc/passwd,1\n": r"line 2: '/etc/passwd' is not below ",
        "path,label\n,1\n": r"line 2 has no path",
        "path,label,split\na.jpg,1,dev\n": r"line 2: split 'dev'; expected one of train, val, validation, test",
        "path,label,split\na.jpg,1,test\n": r"no training images in .*list\.csv, only test",
        'path,label\n"a.jpg,1\n': r"list\.csv after line 2: unexpected end of data; expected CSV text in UTF-8",
        "path,label\n\xff.jpg,1\n": r"list\.csv after line 0: .*invalid start byte; expected CSV text in UTF-8",
    }.items(),
)
def test_mistakes_are_told_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=said) as error:
        make("csv", out=str(tmp_path / "out"), manifest=str(tmp_path / "list.csv"), workers=1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_manifest_is_told(tmp_path: Path) -> None:
    for manifest in (None, str(tmp_path / "none.csv")):
        with pytest.raises(UserError, match=r"--manifest is .*; expected a CSV file"):
            make("csv", out=str(tmp_path / "out"), manifest=manifest, workers=1)

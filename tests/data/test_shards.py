"""Opening a folder of shards: what is there is read, what is missing is one clear error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from trainer.data.shards import ShardFolder
from trainer.errors import UserError


@pytest.fixture
def train(synthetic_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(synthetic_shards / "train", tmp_path / "shards" / "train"))


def test_the_table_of_factors_is_in_the_order_of_index(train: Path) -> None:
    split = ShardFolder.open(train)
    table = split.factors_table()
    assert table.shape == (450, 6)
    assert np.isfinite(table).all()
    with open(split.tar_paths[2], "rb") as tar:
        text = tar.read().split(b'{"hue": ')[1].split(b"}")[0]  # the first sample of the third shard of 100
    assert table[200].tolist() == list(json.loads(b'{"hue": ' + text + b"}").values())


def test_a_manifest_from_before_image_shape_opens(train: Path) -> None:
    assert ShardFolder.open(train).image_shape == (32, 32)
    manifest = json.loads((train / "manifest.json").read_text())
    del manifest["image_shape"]
    (train / "manifest.json").write_text(json.dumps(manifest))
    assert ShardFolder.open(train).image_shape is None


def spoil_missing_tar(train: Path) -> None:
    (train / "train-000001.tar").unlink()


def spoil_missing_index(train: Path) -> None:
    (train / "train-000001.idx").unlink()


def spoil_cut_tar(train: Path) -> None:
    with (train / "train-000001.tar").open("r+b") as tar:
        tar.truncate(10_000)


def spoil_cut_index(train: Path) -> None:
    (train / "train-000001.idx").write_text("")


def spoil_manifest(train: Path) -> None:
    (train / "manifest.json").write_text("{")


def spoil_unfinished(train: Path) -> None:
    (train / "manifest.json").unlink()


def spoil_empty(train: Path) -> None:
    shutil.rmtree(train)
    train.mkdir()


def spoil_all(train: Path) -> None:
    shutil.rmtree(train)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_missing_tar, "train-000001.tar is missing"),
        (spoil_missing_index, "train-000001.idx is missing"),
        (spoil_cut_tar, "train-000001.tar has 10000 bytes"),
        (spoil_cut_index, "train-000001.idx begins with ''"),
        (spoil_manifest, "manifest.json is not readable"),
        (spoil_unfinished, "unfinished"),
        (spoil_empty, "has no shards"),
        (spoil_all, "no folder"),
    ],
)
def test_a_spoilt_folder_is_one_line_with_a_cure(spoil, said: str, train: Path) -> None:
    spoil(train)
    with pytest.raises(UserError, match=said) as error:
        ShardFolder.open(train)
    assert "make_shards.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_parent_of_the_splits_is_told_from_a_split(train: Path) -> None:
    with pytest.raises(UserError, match=r"holds train; expected the folder of one split. Use .*train"):
        ShardFolder.open(train.parent)

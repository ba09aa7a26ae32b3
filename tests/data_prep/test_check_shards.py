"""check_shards finds every kind of damage, names it, and says nothing of sound folders."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_prep.check_shards import check
from trainer.errors import UserError


@pytest.fixture
def folder(synthetic_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(synthetic_shards, tmp_path / "shards"))


def problems(folder: Path, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(UserError) as error:
        check(str(folder), workers=1)
    assert error.value.code == 1
    return capsys.readouterr().out


def offset_of(tar_path: Path, name: str) -> int:
    with tarfile.open(tar_path) as tar:
        return tar.getmember(name).offset_data


def test_a_sound_folder_passes_alone_and_with_the_others(synthetic_shards: Path) -> None:
    for folder in (synthetic_shards, synthetic_shards / "val"):
        check(str(folder), workers=2)


def test_a_truncated_tar(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tar = folder / "train" / "train-000003.tar"
    with tar.open("r+b") as file:
        file.truncate(offset_of(tar, "000000342.png") + 700)
    said = problems(folder, capsys)
    assert (
        "train-000003.tar: broken after sample 000000342" in said or "train-000003.tar: broken after sample 000000341" in said
    )
    assert "samples missing: 000000342, 000000343" in said or "samples missing: 000000343, 000000344" in said
    assert "train-000002" not in said


def test_a_flipped_byte_in_an_image(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tar = folder / "val" / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    data[offset_of(tar, "000000031.png") + 800] ^= 0x10
    tar.write_bytes(data)
    said = problems(folder, capsys)
    assert "val-000000.tar: checksum differs" in said
    assert "val-000000.tar: sample 000000031: corrupt" in said
    assert said.count("\n") == 2


def test_a_flipped_byte_in_a_header(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tar = folder / "val" / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    data[offset_of(tar, "000000031.png") - 512 + 130] ^= 1
    tar.write_bytes(data)
    said = problems(folder, capsys)
    assert "19 samples missing: 000000031, " in said
    assert "val-000000.idx: does not match" in said


def test_a_missing_index_and_a_missing_tar(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "train" / "train-000001.idx").unlink()
    (folder / "test" / "test-000000.tar").unlink()
    said = problems(folder, capsys)
    assert "train-000001.idx: missing" in said
    assert "test-000000.tar: missing" in said
    assert said.count("\n") == 2


def test_a_missing_sample_a_wrong_index_and_a_stray_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tar_path = folder / "train" / "train-000002.tar"
    with tarfile.open(tar_path) as old, tarfile.open(tar_path.with_suffix(".new"), "w", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            if not member.name.startswith("000000250"):
                new.addfile(member, old.extractfile(member))
    tar_path.with_suffix(".new").replace(tar_path)
    shutil.copy(folder / "train" / "train-000000.idx", folder / "train" / "train-000001.idx")
    (folder / "train" / "train-000009.tar").write_bytes(b"")
    said = problems(folder, capsys)
    assert "train-000002.tar: 1 samples missing: 000000250" in said
    assert "train-000002.idx: does not match" in said
    assert "train-000001.idx: does not match" in said
    assert "train-000009.tar: not in the manifest" in said


def test_the_command_exits_with_one_after_naming_all(folder: Path) -> None:
    for split in ("train", "val"):
        next((folder / split).glob("*.idx")).unlink()
    script = Path(__file__).parents[2] / "data_prep" / "check_shards.py"
    run = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout.count(": missing\n") == 2
    assert run.stderr.count("\n") == 1
    empty = subprocess.run([sys.executable, script, folder / "nothing"], capture_output=True, text=True)
    assert empty.returncode == 2
    assert empty.stderr.startswith("error: no folder")

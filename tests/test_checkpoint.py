"""Checkpoints: whole or absent, verified, and refused where they do not belong."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runs import ROOT, SMALL, losses, small_run
from trainer.checkpoint import load_objective
from trainer.errors import STORAGE, UserError


@pytest.fixture(scope="module")
def finished(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainer.loop import train

    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(small_run(synthetic_shards, out, schedule__epochs=1)) == 0
    return out


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def newest(run_folder: Path) -> Path:
    return max((run_folder / "checkpoints").glob("step-*"))


def sign(folder: Path, name: str) -> None:
    """Make the manifest vouch for a file that was changed, as somebody who means harm would."""
    data = (folder / name).read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.safetensors", "optimiser-00000.pt", "loader-00000.bin", "manifest.json"])
def test_a_flipped_byte_is_found_and_the_run_goes_on_from_the_checkpoint_before(run_folder, synthetic_shards, capfd, name):
    from trainer.loop import train

    before = losses(run_folder)
    path = newest(run_folder) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert train(small_run(synthetic_shards, run_folder, schedule__epochs=1)) == 0
    assert "damaged" in capfd.readouterr().err
    assert losses(run_folder) == before


def test_when_all_are_damaged_nothing_is_started_over(run_folder, synthetic_shards):
    from trainer.loop import train

    for path in (run_folder / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="are damaged"):
        train(small_run(synthetic_shards, run_folder, schedule__epochs=1))


def test_other_settings_are_refused_by_name_and_free_ones_are_not(run_folder, synthetic_shards):
    from trainer.loop import train

    with pytest.raises(UserError, match=r"optimiser\.lr was 0\.002 and is 0\.1.*--out"):
        train(small_run(synthetic_shards, run_folder, schedule__epochs=1, optimiser__lr=0.1))
    assert train(small_run(synthetic_shards, run_folder, schedule__epochs=1, data__threads=1, tracking__log_every=2)) == 0


def test_the_objective_comes_back_with_equal_features(run_folder):
    images = torch.randn(4, 3, 32, 32)
    first, run = load_objective(run_folder)
    second, _ = load_objective(newest(run_folder))
    assert run.model.args == SMALL["model.args"]
    assert torch.equal(first.embed(images), second.embed(images))
    assert not first.training


def test_weights_of_another_model_are_refused_by_name(run_folder):
    folder = newest(run_folder)
    settings = json.loads((folder / "settings.json").read_text())
    settings["model"]["args"]["channels"] = [4, 8, 8, 32]
    (folder / "settings.json").write_text(json.dumps(settings))
    sign(folder, "settings.json")
    with pytest.raises(UserError, match=r"another model.*projector\.0\.weight|another model.*layer4"):
        load_objective(folder)


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        load_objective(tmp_path)


class Evil:
    """Pickled, it runs code when it is loaded carelessly."""

    def __reduce__(self):
        return (pytest.fail, ("code ran while loading",))


def test_nothing_is_unpickled(run_folder, synthetic_shards):
    from trainer.loop import train

    path = newest(run_folder)
    torch.save({"state": Evil()}, path / "optimiser-00000.pt")
    sign(path, "optimiser-00000.pt")
    with pytest.raises(pickle.UnpicklingError):
        train(small_run(synthetic_shards, run_folder, schedule__epochs=1))


def test_keeping_the_newest_never_means_keeping_the_damaged(run_folder, synthetic_shards):
    """Resumed behind a damaged checkpoint, a run that keeps one must not delete its only sound one."""
    from trainer.checkpoint import _damage
    from trainer.loop import train

    newest(run_folder).joinpath("model.safetensors").write_bytes(b"")
    newest(run_folder).rename(run_folder / "checkpoints" / "step-00000099")
    assert train(small_run(synthetic_shards, run_folder, schedule__epochs=1, checkpoint__keep=1)) == 0
    left = list((run_folder / "checkpoints").glob("step-*"))
    assert [path.name for path in left if not _damage(path)] == [path.name for path in left] == ["step-00000014"]


def test_two_processes_do_not_train_in_one_folder(run_folder, synthetic_shards):
    import fcntl

    from trainer.loop import train

    with (run_folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process trains in"):
            train(small_run(synthetic_shards, run_folder, schedule__epochs=1))


FULL_DISK = """
set -e
mount -t tmpfs -o size={size}k tmpfs {disk}
cp -r {run} {disk}/run
exec {python} launch/train.py --recipe demo {flags} --schedule.epochs 2 --data.shards {shards} --out {disk}/run
"""


def test_a_full_disk_ends_the_run_and_leaves_the_previous_checkpoint(synthetic_shards, tmp_path):
    """A real full disk: a small tmpfs in a mount namespace of its own."""
    from trainer.loop import train

    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"cannot mount a tmpfs in a namespace here: {probe.stderr.strip()}")
    run = tmp_path / "run"
    assert train(small_run(synthetic_shards, run, schedule__epochs=2, checkpoint__every_steps=20)) == 0
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) // 1024 + 60
    disk = tmp_path / "disk"
    disk.mkdir()
    flags = " ".join(f"--{key} '{value}'" for key, value in (SMALL | {"checkpoint.every_steps": 20}).items())
    script = FULL_DISK.format(size=size, disk=disk, run=run, python=sys.executable, flags=flags, shards=synthetic_shards)
    script = script.replace("exec ", "set +e; ") + f"code=$?; echo code $code; ls -a {disk}/run/checkpoints"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert f"code {STORAGE}" in done.stdout, done.stdout + done.stderr
    assert "cannot be written" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "step-00000020" in done.stdout
    assert "unfinished" not in done.stdout

"""Making shards: what is written, that it is the same every time, and that nothing half-written is ever seen."""

import fcntl
import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import synthetic
from data_prep.make_shards import make
from trainer.data.shards import ShardFolder
from trainer.errors import UserError

SCRIPT = Path(__file__).parents[2] / "data_prep" / "make_shards.py"


def command(*args: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, args)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def drawn(split: ShardFolder, factors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The images that the factors of a split belong to, found by drawing all of them anew."""
    images, known = synthetic.draw(0, int(split.split == "test"), np.arange(500), 32)
    row = {tuple(np.round(k, 6)): i for i, k in enumerate(known)}
    numbers = np.array([row[tuple(f)] for f in factors])
    assert (numbers % len(synthetic.CLASSES) == labels).all()
    return images[numbers]


def test_webdataset_reads_back_what_was_drawn(synthetic_shards: Path) -> None:
    import webdataset

    seen = set()
    for name in ("train", "val"):
        split = ShardFolder.open(synthetic_shards / name)
        samples = list(webdataset.WebDataset(split.tar_paths, shardshuffle=False).decode("rgb8"))
        table = split.factors_table()
        assert [sample["index"] for sample in samples] == list(range(split.samples))
        assert [[sample["json"][f] for f in split.factors] for sample in samples] == table.tolist()
        labels = np.array([sample["cls"] for sample in samples])
        np.testing.assert_array_equal([sample["png"] for sample in samples], drawn(split, table, labels))
        seen |= set(map(tuple, table))
    assert len(seen) == 500  # train and val share nothing


def test_dali_reads_the_same_through_our_index(synthetic_shards: Path) -> None:
    from nvidia.dali import fn, pipeline_def, types

    split = ShardFolder.open(synthetic_shards / "val")

    @pipeline_def(batch_size=split.samples, num_threads=1, device_id=None)
    def pipeline():
        encoded, *numbers = fn.readers.webdataset(
            paths=split.tar_paths, index_paths=split.index_paths, ext=["png", "cls", "index"], dtypes=[types.UINT8] * 3
        )
        return fn.decoders.image(encoded, device="cpu"), *numbers

    images, labels, indices = (np.asarray(output.as_array()) for output in pipeline().run())
    labels, indices = ([int(bytes(row)) for row in rows] for rows in (labels, indices))
    assert indices == list(range(split.samples))
    np.testing.assert_array_equal(images, drawn(split, split.factors_table(), np.array(labels)))


def test_the_index_is_what_dali_s_own_tool_writes(synthetic_shards: Path, tmp_path: Path) -> None:
    from wds2idx import IndexCreator

    for tar in synthetic_shards.glob("*/*.tar"):
        with IndexCreator(str(tar), str(tmp_path / "index"), verbose=False) as creator:
            creator.create_index()
        assert filecmp.cmp(tmp_path / "index", tar.with_suffix(".idx"), shallow=False)


def test_three_workers_write_the_bytes_that_one_writes(synthetic_shards: Path, tmp_path: Path) -> None:
    run = subprocess.run(command("--out", tmp_path, "--samples=500", "--shard_size=100", "--workers=3"), capture_output=True)
    assert run.returncode == 0, run.stderr
    assert files(tmp_path) == files(synthetic_shards)


def test_other_seeds_give_other_images_and_limit_counts_each_split(tmp_path: Path) -> None:
    for seed in (0, 1):
        make(out=str(tmp_path / str(seed)), samples=100, seed=seed, limit=7, workers=1)
    train = [ShardFolder.open(tmp_path / seed / "train") for seed in ("0", "1")]
    assert [split.samples for split in train] == [7, 7]
    assert not set(map(tuple, train[0].factors_table())) & set(map(tuple, train[1].factors_table()))


def test_killed_at_any_moment_the_same_command_finishes_the_same_folder(tmp_path: Path) -> None:
    """And whatever bears a final name at any moment is whole."""
    args = ("--samples=2000", "--shard_size=50", "--workers=2")
    subprocess.run(command("--out", tmp_path / "whole", *args), check=True, capture_output=True)
    out, staged = tmp_path / "killed", tmp_path / "killed" / ".train.partial"
    for records in (1, 12):
        process = subprocess.Popen(command("--out", out, *args), stderr=subprocess.DEVNULL)
        while len(list(staged.glob("*.record"))) < records:
            assert process.poll() is None
            assert not [name for name in ("train", "val", "test") if (out / name).exists()]
            time.sleep(0.005)
        workers = children(process.pid)
        process.kill()
        process.wait()
        time.sleep(0.2)
        assert len(workers) == 2
        assert not any(map(alive, workers))
        for record in staged.glob("*.record"):
            assert filecmp.cmp(record.with_suffix(".tar"), tmp_path / "whole" / "train" / f"{record.stem}.tar", shallow=False)
    kept = {path.stem: path.with_suffix(".tar").stat().st_mtime_ns for path in staged.glob("*.record")}
    (staged / "train-000029.tar.tmp").write_text("stale")
    process = subprocess.Popen(command("--out", out, *args), stderr=subprocess.DEVNULL)
    while process.poll() is None:
        for split in [out / name for name in ("train", "val", "test") if (out / name).exists()]:
            ShardFolder.open(split)
    assert process.returncode == 0
    assert files(out) == files(tmp_path / "whole")
    assert {stem: (out / "train" / f"{stem}.tar").stat().st_mtime_ns for stem in kept} == kept  # not written twice


def test_a_damaged_leftover_is_written_anew(tmp_path: Path) -> None:
    args = ("--samples=1000", "--shard_size=50", "--workers=1")
    process = subprocess.Popen(command("--out", tmp_path / "a", *args), stderr=subprocess.DEVNULL)
    staged = tmp_path / "a" / ".train.partial"
    while len(list(staged.glob("*.record"))) < 2:
        time.sleep(0.005)
    process.kill()
    process.wait()
    with (staged / "train-000000.tar").open("r+b") as tar:
        tar.seek(3000)
        tar.write(b"damage")
    for name in "ab":
        subprocess.run(command("--out", tmp_path / name, *args), check=True, capture_output=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_control_c_ends_with_one_line(tmp_path: Path) -> None:
    args = ("--samples=50000", "--shard_size=100", "--workers=2")
    process = subprocess.Popen(command("--out", tmp_path, *args), stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((tmp_path / ".train.partial").glob("*.record")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes at once
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "error: interrupted; expected to finish. The same command continues.\n"


def test_a_finished_folder_is_left_alone_and_another_plan_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = {"out": str(tmp_path), "samples": 100, "workers": 1}
    make(**settings)
    before = files(tmp_path)
    make(**settings)
    assert capsys.readouterr().err.count("already there") == 3
    with pytest.raises(UserError, match=r"train was made with validation 0.1; expected validation 0.2. .*--overwrite"):
        make(**settings, validation=0.2)
    assert files(tmp_path) == before
    make(**settings, validation=0.2, overwrite=True)
    assert ShardFolder.open(tmp_path / "val").samples == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train", "val"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not of make_shards"):
        make(out=str(tmp_path), samples=100, workers=1, overwrite=True)
    assert files(tmp_path) == {"train/thesis.txt": b"years of work"}


def test_two_makers_do_not_share_a_folder(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another make_shards"):
        make(out=str(tmp_path), samples=100, workers=1)
    os.close(handle)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--source=cifar11"], "--source is 'cifar11'"),
        (["--source=cifar10"], "--root is None"),
        (["--source=imagefolder", "--root=."], "no images"),
        (["--source=stl10", "--root=."], "no STL-10"),
        (["--split=all", "--validation=1.5"], "--validation is 1.5"),
        (["--split=dev"], "--split is 'dev'"),
        (["--shard_size=many"], "--shard_size is 'many'"),
        (["--split=val", "--validation=0"], "has no images for val"),
        (["--out=/proc/none"], "/proc/none"),
    ],
)
def test_bad_settings_end_with_one_line(args: list[str], said: str, tmp_path: Path) -> None:
    run = subprocess.run(command(*args), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert said in run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert not files(tmp_path)


def test_help_is_fast_because_torch_is_not_loaded() -> None:
    code = "import sys, data_prep.make_shards, data_prep.check_shards; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_manifest_tells_what_the_folder_holds(synthetic_shards: Path) -> None:
    manifest = json.loads((synthetic_shards / "train" / "manifest.json").read_text())
    assert manifest["samples"] == sum(shard["samples"] for shard in manifest["shards"]) == 450
    assert manifest["classes"] == list(synthetic.CLASSES)
    assert (manifest["format"], manifest["split"], manifest["image_size"], manifest["seed"]) == (1, "train", [32, 32], 0)
    assert manifest["image_shape"] == [32, 32]

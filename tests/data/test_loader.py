import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from trainer.config import Augmentation
from trainer.data.augment import draw_view
from trainer.data.loader import Loader, rank_batch_size
from trainer.data.shards import ShardFolder
from trainer.data.views import ViewSpec
from trainer.errors import UserError

PLAIN = ViewSpec("plain", 1, 8, None)
PAIRED = ViewSpec("paired", 2, 24, Augmentation(), "group", groups=4)
SINGLE = ViewSpec("single", 1, 32, Augmentation())
MOVED = Augmentation(rotation=90, elastic=0.5, corners="inscribed", second={"solarize": 1.0, "corners": "reflect"})
TURNED = ViewSpec("turned", 2, 24, MOVED.pair(), "group", groups=4)


def loader(folder: ShardFolder, views=(PLAIN,), **options) -> Loader:
    defaults = {"batch_size": 8, "seed": 0, "mean": (0.5,) * 3, "std": (0.25,) * 3, "threads": 1}
    return Loader(folder, views, **(defaults | options))


def train(shards: Path) -> ShardFolder:
    return ShardFolder.open(shards / "train")


def same(a, b) -> bool:
    tensors = torch.equal(a.index, b.index) and torch.equal(a.label, b.label)
    draws = all(np.array_equal(a.draws[v][name], b.draws[v][name]) for v in a.draws for name in a.draws[v])
    return tensors and draws and all(torch.equal(a.views[name], b.views[name]) for name in a.views)


@pytest.mark.parametrize(
    ("samples", "shards", "world", "batch"),
    [
        (10, 1, 1, 3),
        (11, 3, 2, 2),
        (13, 2, 3, 2),
        (7, 7, 2, 3),
        (23, 4, 5, 2),
        (24, 3, 4, 6),
        (25, 3, 4, 6),
        (9, 1, 4, 1),
        (17, 5, 1, 17),
    ],
)
def test_every_rank_takes_the_known_number_of_whole_batches_of_its_own_images(numbered, samples, shards, world, batch):
    folder, epochs = numbered(samples, shards), 4
    ranks = [loader(folder, batch_size=batch, rank=rank, world_size=world) for rank in range(world)]
    steps = samples // world // batch
    assert [rank.steps_per_epoch for rank in ranks] == [steps] * world
    seen: Counter[int] = Counter()
    for _ in range(epochs):
        epoch = [i for rank in ranks for _ in range(steps) for i in next(rank).index.tolist()]
        assert len(epoch) == len(set(epoch)) == steps * batch * world
        seen.update(epoch)
    if steps * batch * world == samples:
        assert set(seen.values()) == {epochs}


@pytest.mark.parametrize("world", [1, 3, 30])
def test_evaluation_sees_every_image_once_and_in_order(numbered, world):
    folder = numbered(25, 3)
    ranks = [[batch.index.tolist() for batch in loader(folder, shuffle=False, rank=r, world_size=world)] for r in range(world)]
    assert [i for rank in ranks for batch in rank for i in batch] == list(range(25))


def test_batches_hold_the_images_labels_and_draws_they_name(shards_of):
    images = [np.full((20, 20, 3), i, np.uint8) for i in range(40)]
    still = Augmentation(flip=0, jitter=0, grayscale=0, blur=0)
    views = (ViewSpec("a", 2, 16, still), ViewSpec("b", 1, 16, None))
    stream = loader(shards_of(images, 16), views, mean=(0, 0, 0), std=(1 / 255,) * 3)
    for step in range(7):
        batch = next(stream)
        assert batch.views["a"].shape == (2, 8, 3, 16, 16)
        assert batch.views["b"].shape == (1, 8, 3, 16, 16)
        assert batch.label.tolist() == [i % 10 - 1 for i in batch.index.tolist()]
        for view in batch.views.values():
            np.testing.assert_allclose(view.mean((0, 2, 3, 4)), batch.index, atol=1e-3)
        drawn = draw_view(views[0], seed=0, step=step, rank=0, batch_size=8, world_size=1)
        assert batch.draws["b"] == {}
        assert all(np.array_equal(batch.draws["a"][name], drawn[name]) for name in drawn)
        assert stream.wait_s > 0


@pytest.mark.parametrize("view", [PAIRED, TURNED])
def test_equal_images_of_a_group_give_equal_views_and_of_two_groups_do_not(shards_of, view):
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    views = next(loader(shards_of([image] * 8), (view,))).views[view.name].reshape(2, 4, 2, -1)
    assert torch.equal(views[:, :, 0], views[:, :, 1])
    assert len(torch.unique(views[:, :, 0].reshape(8, -1), dim=0)) == 8


def test_multi_crop_is_two_sizes_of_views_of_the_same_images(shards_of):
    images = [np.full((40, 40, 3), 3 * i, np.uint8) for i in range(40)]
    a = Augmentation(jitter=0, grayscale=0, local={"crop_scale": [0.05, 0.4]})
    views = (ViewSpec("base", 2, 224, a.pair()), ViewSpec("local", 8, 96, a.variant("local")))
    batch = next(loader(shards_of(images), views, mean=(0, 0, 0), std=(3 / 255,) * 3))
    for name, shape in [("base", (2, 8, 3, 224, 224)), ("local", (8, 8, 3, 96, 96))]:
        assert batch.views[name].shape == shape
        np.testing.assert_allclose(batch.views[name].mean((2, 3, 4)), batch.index.expand(shape[:2]), atol=1e-3)
    area = {name: draws["extent"].prod(-1) for name, draws in batch.draws.items()}
    assert area["local"].max() <= 0.4 + 1e-6
    assert area["base"].min() >= 0.2 - 1e-6


def test_rotated_views_leave_the_views_beside_them_alone(synthetic_shards):
    options = {"shuffle": False, "batch_size": 16}
    plain, single = replace(PLAIN, size=32), SINGLE
    alone = next(loader(train(synthetic_shards), (plain, single), **options))
    beside = next(loader(train(synthetic_shards), (TURNED, plain, single), **options))
    assert beside.draws["plain"] == {}
    assert all(torch.equal(alone.views[name], beside.views[name]) for name in ("plain", "single"))


def test_two_ranks_make_views_of_the_draws_of_one(synthetic_shards):
    views = (PAIRED, SINGLE, TURNED)
    alone = loader(train(synthetic_shards), views)
    halves = [loader(train(synthetic_shards), views, batch_size=4, rank=r, world_size=2) for r in (0, 1)]
    for _ in range(3):
        whole, parts = next(alone).draws, [next(half).draws for half in halves]
        for view in whole:
            for name, value in whole[view].items():
                assert np.array_equal(value, np.concatenate([part[view][name] for part in parts], 1))


@pytest.mark.parametrize("buffer", [20, 4096])
def test_a_loader_goes_on_bit_for_bit_from_its_state(synthetic_shards, buffer):
    """Of 56 steps an epoch: at the start, within, at, and after epoch ends, and with another number of threads."""
    folder = train(synthetic_shards)
    options, views = {"shuffle_buffer": buffer}, (PAIRED, SINGLE, TURNED)
    whole, expected, states = loader(folder, views, **options), [], {}
    assert whole.steps_per_epoch == 56
    for step in range(120):
        if step in (0, 1, 30, 55, 56, 57, 112, 113):
            states[step] = whole.state()
        expected.append(next(whole))
    for step, state in states.items():
        resumed = loader(folder, views, threads=2, state=state, **options)
        assert resumed.state() == state
        assert all(same(next(resumed), batch) for batch in expected[step : step + 5]), step


def test_a_loader_goes_on_in_a_folder_that_was_moved(numbered):
    here = loader(numbered(50, 3, "here"))
    for _ in range(3):
        next(here)
    there = loader(numbered(50, 3, "there"), state=here.state())
    assert all(same(next(here), next(there)) for _ in range(10))


KILLED = """
import sys, hashlib, json, os, pathlib
import trainer.data.loader as L
from trainer.config import Augmentation
from trainer.data.shards import ShardFolder
from trainer.data.views import ViewSpec
shards, out = sys.argv[1:]
state = pathlib.Path(out) / "state"
views = [ViewSpec("paired", 2, 24, Augmentation(), "group", groups=4)]
stream = L.Loader(ShardFolder.open(shards), views, batch_size=8, seed=0, mean=(0.5,) * 3, std=(0.25,) * 3,
    shuffle_buffer=64, state=state.read_bytes() if state.exists() else None)
done = json.loads(state.read_bytes().partition(b"\\n")[0])["iteration"] if state.exists() else 0
for step in range(done, 40):
    batch = next(stream)
    digest = hashlib.sha256(batch.views["paired"].numpy().tobytes() + batch.index.numpy().tobytes()).hexdigest()
    with open(pathlib.Path(out) / "log", "a") as log: log.write(f"{step} {digest}\\n")
    pathlib.Path(out, "new").write_bytes(stream.state()); os.replace(pathlib.Path(out, "new"), state)
"""


def test_killing_the_process_changes_nothing(synthetic_shards, tmp_path):
    def start(out: str) -> subprocess.Popen:
        (tmp_path / out).mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", KILLED, str(synthetic_shards / "train"), str(tmp_path / out)]
        )

    unkilled = start("unkilled")
    killed = start("killed")
    log = tmp_path / "killed" / "log"
    while killed.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 10):
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert start("killed").wait() == unkilled.wait() == 0
    ours, theirs = ((tmp_path / out / "log").read_text().splitlines() for out in ("killed", "unkilled"))
    assert set(ours) == set(theirs)  # a step between the log and the state runs twice, alike
    assert len(theirs) == 40


def test_a_state_of_other_data_or_settings_is_refused(numbered):
    folder = numbered(50)
    state = loader(folder).state()
    with pytest.raises(UserError, match=r"batch_size 8.*expected 4"):
        loader(folder, batch_size=4, state=state)
    with pytest.raises(UserError, match="seed"):
        loader(folder, seed=1, state=state)
    with pytest.raises(UserError, match="shards"):
        loader(numbered(51, name="others"), state=state)
    for broken in (b"", b"\x80\x04garbage", b"[1]\n", json.dumps({"format": 1}).encode()):
        with pytest.raises(UserError, match="unreadable"):
            loader(folder, state=broken)


def order(stream: Loader) -> np.ndarray:
    return np.concatenate([next(stream).index for _ in range(stream.steps_per_epoch)])


def rank_correlation(a: np.ndarray) -> float:
    return float(np.corrcoef(np.arange(len(a)), a)[0, 1])


def test_a_buffer_of_the_whole_part_shuffles_fully_and_each_epoch_anew(numbered):
    stream = loader(numbered(2000, 1), batch_size=50)
    first, second = order(stream), order(stream)
    other_seed = order(loader(stream.folder, batch_size=50, seed=1))
    for a in (first, second, other_seed):
        assert abs(rank_correlation(a)) < 4 / np.sqrt(2000)
    for a, b in ((first, second), (first, other_seed)):
        assert abs(np.corrcoef(np.argsort(a), np.argsort(b))[0, 1]) < 4 / np.sqrt(2000)


def test_a_small_buffer_keeps_neighbours_near_and_the_tars_change_their_order(numbered):
    within = order(loader(numbered(2000, 1, "one"), batch_size=50, shuffle_buffer=100))
    assert 0.9 < rank_correlation(within) < 0.999
    stream = loader(numbered(2000, 20, "many"), batch_size=50, shuffle_buffer=100)
    epochs = [order(stream) for _ in range(3)]
    assert max(abs(rank_correlation(a)) for a in epochs) < 0.8  # 20 tars in a random order
    assert abs(np.corrcoef(np.argsort(epochs[0]), np.argsort(epochs[1]))[0, 1]) < 0.8


def test_a_loader_that_is_dropped_takes_its_threads_along(synthetic_shards):
    gc.collect()
    before = psutil.Process().num_threads()
    gc.disable()
    try:
        for _ in range(3):
            next(loader(train(synthetic_shards), (SINGLE,)))
        assert psutil.Process().num_threads() <= before
    finally:
        gc.enable()


def test_too_few_images_for_a_batch_are_refused(numbered):
    with pytest.raises(UserError, match=r"holds 10 samples; expected at least one batch, 8 on each of 2 ranks"):
        loader(numbered(10), world_size=2)


def damage(folder: ShardFolder, shard: int, sample: int, data: bytes) -> str:
    """Overwrite the beginning of an image, leaving sizes as they are."""
    tar = Path(folder.tar_paths[shard])
    offset = int(Path(folder.index_paths[shard]).read_text().splitlines()[1 + sample].split()[1])
    content = bytearray(tar.read_bytes())
    content[offset : offset + len(data)] = data
    tar.write_bytes(content)
    return tar.name


def run_through(folder: ShardFolder) -> None:
    stream = loader(folder, shuffle=False)
    for _ in stream:
        pass


@pytest.mark.parametrize("data", [bytes(60), b"hello world " * 5], ids=["zeros", "text"])
def test_a_corrupt_image_is_named_with_its_shard(numbered, data):
    folder = numbered(40, 2)
    name = damage(folder, 1, 3, data)
    with pytest.raises(UserError, match=rf"{name} .*image 3.*is damaged.*check_shards"):
        run_through(folder)


def test_a_shard_truncated_after_it_was_opened_is_named(numbered):
    folder = numbered(40, 2)
    tar = Path(folder.tar_paths[1])
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{tar.name}.* is damaged"):
        run_through(folder)


def test_a_failure_that_no_shard_explains_stays_as_it_is(numbered, monkeypatch):
    stream = loader(numbered(40, 2))
    monkeypatch.setattr(stream, "_source", _Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)


class _Failing:
    def __next__(self):
        raise RuntimeError("out of memory")


def test_batches_must_hold_whole_groups_on_every_rank():
    assert rank_batch_size(64, 4, [PAIRED, PLAIN]) == 16
    for batch, world, words in [
        (10, 4, "data.batch_size is 10"),
        (66, 1, "objective.groups 4"),
        (4, 1, "two images or more"),
        (24, 3, "objective.groups is 4"),
    ]:
        with pytest.raises(UserError, match=words):
            rank_batch_size(batch, world, [PAIRED])

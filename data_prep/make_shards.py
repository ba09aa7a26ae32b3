"""Makes WebDataset shards of a data set: decoded and checked, shuffled, indexed for DALI, resumable.

python data_prep/make_shards.py                                            # drawn images with known factors
python data_prep/make_shards.py --source imagefolder --root DIR --out DIR

An imagefolder is ROOT/train/CLASS/FILE with ROOT/test or ROOT/val beside it, as ImageNet, ImageNet-100 and Imagenette are
published: unpack the archive and name its folder (`tar xf imagenette2-160.tgz`, then `--root imagenette2-160`). Without
train/ it is ROOT/CLASS/FILE; files without a class folder are unlabelled, and with --unlabelled all are. Parquet files are
those of the Hugging Face hub (`--source parquet --root DIR`), and a CSV file lists path, label and, if you like, split
(`--source csv --manifest FILE`). Images are stored as they are if jpg, png or webp; among several kinds the others are
re-encoded to the kind of the majority.

Images are shuffled altogether; those of parquet, which is read by whole row groups, within random sets of row groups that
make eight shards (data_prep/order.py).
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.order import choose
from data_prep.processes import console, run
from data_prep.sources import open_source
from data_prep.sources.source import Options
from data_prep.writer import Report, Split, find_bad, prepare_staging, publish, staging, write_shard
from trainer.data.shards import ShardFolder
from trainer.errors import UserError, exit_with_one_line

SPLITS = ("train", "val", "test")


def make(
    source: str = "synthetic",
    root: str | None = None,
    out: str | None = None,
    split: str = "all",
    validation: float = 0.1,
    shard_size: int = 1000,
    workers: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    samples: int = 10_000,
    size: int = 32,
    download: bool = False,
    manifest: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    unlabelled: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> None:
    """Write OUT/train, OUT/val and OUT/test: tars, DALI indices and a manifest each.

    Equal settings give equal bytes, with any number of workers. Interrupted, the same command continues.

    Args:
        source: cifar10, cifar100, stl10 (official files, binary or python layout), imagefolder, parquet, csv or synthetic.
        root: folder of the data. An imagefolder holds train/CLASS/FILE and test/ or val/, or CLASS/FILE.
        out: folder to write; default shards/SOURCE.
        split: all, train, val or test.
        validation: share of the labelled training images that becomes val.
        shard_size: images per shard.
        workers: processes; default one per core.
        seed: of the shuffle, of the choice of val, and of the drawings.
        limit: at most so many images of each split.
        samples: drawings for train and val together; test has a tenth of it more.
        size: height and width of the drawings, pixels.
        download: fetch the official files into root (torchvision).
        manifest: CSV file with a header; its paths are relative to root, or to its own folder.
        image_column: of parquet, encoded images (default image), or of the manifest, paths (default path).
        label_column: of parquet or the manifest (default label); numbers or names.
        unlabelled: leave labels out: of an imagefolder, of parquet, of a manifest.
        skip_bad: leave out corrupt images instead of stopping; reads everything twice.
        overwrite: replace shards that were made with other settings.
    """
    _validate(split, validation, shard_size=shard_size, workers=workers, seed=seed, limit=limit, samples=samples, size=size)
    folder = _path(out) or Path("shards", source)
    options = Options(
        root=_path(root),
        seed=seed,
        samples=samples,
        size=size,
        download=download,
        manifest=_path(manifest),
        image_column=None if image_column is None else str(image_column),
        label_column=None if label_column is None else str(label_column),
        unlabelled=unlabelled,
    )
    try:
        opened = open_source(source, options)
        names = [name for name in SPLITS if split in ("all", name)]
        plan = {
            "source": source,
            "seed": seed,
            "validation": validation,
            "limit": limit,
            "shard_size": shard_size,
            "skip_bad": skip_bad,
        }
        splits = [choose(opened, name, plan | {"content": opened.fingerprint}) for name in names]
        if split != "all" and not len(splits[0].numbers):
            raise UserError(f"{source} has no images for {split}", "some", "Choose another --split or a larger --validation.")
        with _lock(folder):
            _check_others(splits, folder)
            write([s for s in splits if len(s.numbers)], folder, workers, overwrite)
    except KeyboardInterrupt:
        raise UserError("interrupted", "to finish", "The same command continues.", code=130) from None
    except OSError as error:
        raise UserError(f"{error}", f"to read the source and to write {folder}", "Then the same command continues.") from error


def write(splits: list[Split], out: Path, workers: int | None, overwrite: bool) -> None:
    """Stage every split that is not there, then publish them.

    Raises:
        UserError: a folder is there with another plan; images are bad (and nothing is published).
    """
    todo = [split for split in splits if not _there(split, out, overwrite)]
    if any(split.plan["skip_bad"] for split in todo):
        todo = _without_bad(todo, workers)
    for split in todo:
        prepare_staging(out, split)
    reports = _run("writing", workers, partial(write_shard, out), todo)
    bad = [image for report in reports for image in report.bad]
    if bad:
        for split in todo:
            shutil.rmtree(staging(out, split.name))
        first = "; ".join(map(str, bad[:3])) + ("; ..." if len(bad) > 3 else "")
        raise UserError(f"{len(bad)} bad images: {first}", "images that decode", "Repair or remove them, or add --skip_bad.")
    for split in todo:
        publish(out, split, [report for report in reports if report.split == split.name])
        console.print(f"{out / split.name}: {len(split.numbers):,} images in {split.shards:,} shards")


def _there(split: Split, out: Path, overwrite: bool) -> bool:
    """Whether the split is finished in `out`; an error if something else is."""
    folder = out / split.name
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        plan = json.loads((folder / "manifest.json").read_text())["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is not of make_shards", "a new folder", "Choose another --out, or remove it.") from None
    if overwrite:
        return False
    other = {key: value for key, value in split.plan.items() if plan.get(key) != value}
    if other:
        was, now = (", ".join(f"{key} {values.get(key)}" for key in other) for values in (plan, split.plan))
        raise UserError(f"{folder} was made with {was}", now, "Choose another --out, or add --overwrite.")
    ShardFolder.open(folder)
    shutil.rmtree(staging(out, split.name), ignore_errors=True)
    console.print(f"{folder}: already there")
    return True


def _check_others(splits: list[Split], out: Path) -> None:
    """The splits in `out` that this command does not write must be of the same plan: else train may hold images of val."""
    written = {split.name for split in splits if len(split.numbers)}
    plan = {key: value for key, value in splits[0].plan.items() if key not in ("split", "limit", "shard_size", "skip_bad")}
    for name in set(SPLITS) - written:
        try:
            was = json.loads((out / name / "manifest.json").read_text())["plan"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        other = [key for key, value in plan.items() if was.get(key) != value]
        if other:
            then, now = (", ".join(f"{key} {values.get(key)}" for key in other) for values in (was, plan))
            raise UserError(f"{out / name} was made with {then}", now, f"Choose another --out, or remove {out / name}.")


def _without_bad(splits: list[Split], workers: int | None) -> list[Split]:
    """Leave out the images that cannot be used, so that those written are numbered without gaps."""
    reports = _run("checking", workers, find_bad, splits)
    good = []
    for split in splits:
        bad = [image for report in reports if report.split == split.name for image in report.bad]
        for image in bad[:3]:
            console.print(f"left out: {image}", style="yellow")
        if bad:
            console.print(f"{split.name}: {len(bad):,} bad images of {len(split.numbers):,} left out")
        if len(bad) == len(split.numbers):
            raise UserError(f"every image of {split.name} is bad: {bad[0]}", "images that decode", "Correct --root.")
        good.append(replace(split, numbers=split.numbers[~np.isin(split.numbers, [image.number for image in bad])]))
    return good


def _run(title: str, workers: int | None, function: Callable[[Split, int], Report], splits: list[Split]) -> list[Report]:
    """function(split, number) of every shard."""
    jobs = [(split, number) for split in splits for number in range(split.shards)]
    return run(title, workers, function, jobs, [len(split.shard(number)) for split, number in jobs])


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One maker at a time in a folder; the lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another make_shards is writing {folder}", "one at a time", "Wait for it.") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(str(name))  # fire reads a name of digits as a number


def _validate(split: str, validation: float, **whole: int | None) -> None:
    if split not in ("all", *SPLITS):
        raise UserError(f"--split is {split!r}", f"one of all, {', '.join(SPLITS)}", "Correct it.")
    if not isinstance(validation, int | float) or not 0 <= validation < 1:
        raise UserError(f"--validation is {validation!r}", "a share of at least 0 and below 1", "Correct it.")
    for name, value in whole.items():
        low = {"seed": 0, "size": 8, "samples": 10}.get(name, 1)
        if value is not None and (type(value) is not int or value < low):
            raise UserError(f"--{name} is {value!r}", f"a whole number of at least {low}", "Correct it.")


if __name__ == "__main__":
    exit_with_one_line(make)

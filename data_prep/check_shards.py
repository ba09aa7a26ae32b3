"""Verifies a folder of shards to the last byte, and names every bad shard and sample.

python data_prep/check_shards.py DIR
"""

import os
import tarfile
from pathlib import Path

from data_prep.processes import console, run
from data_prep.sources.encoding import decode
from data_prep.writer import file_sha256
from trainer.data.shards import Shard, ShardFolder
from trainer.errors import UserError, exit_with_one_line


def check(folder: str, workers: int | None = None) -> None:
    """Check sizes, checksums, tar structure, the order of samples, that every image decodes, and the DALI indices.

    Args:
        folder: a split's folder, or the folder of several splits.
        workers: processes; default one per core.

    Raises:
        UserError: no shards there (exit code 2), or some are bad (exit code 1).
    """
    if workers is not None and (type(workers) is not int or workers < 1):
        raise UserError(f"--workers is {workers!r}", "a whole number of at least 1", "Correct it.")
    splits = _splits(Path(str(folder)))
    jobs = [(split, number) for split in splits for number in range(len(split.shards))]
    try:
        found = run("checking", workers, check_shard, jobs, [split.shards[number].samples for split, number in jobs])
    except KeyboardInterrupt:
        raise UserError("interrupted", "to finish", "Nothing was changed.", code=130) from None
    problems = [problem for split in splits for problem in _strays(split)] + [p for shard in found for p in shard]
    for problem in problems:
        print(problem)
    if problems:
        bad = sum(map(bool, found))
        remedy = "Copy them again, or make them again with make_shards.py --overwrite."
        raise UserError(f"{len(problems)} problem(s), {bad} of {len(jobs)} shard(s) bad in {folder}", "none", remedy, code=1)
    console.print(f"{folder}: {sum(split.samples for split in splits):,} images in {len(jobs):,} shards are good")


def check_shard(split: ShardFolder, number: int) -> list[str]:
    """What is wrong with one shard, a line each."""
    shard = split.shards[number]
    tar, index = split.path / shard.name, split.path / shard.index_name
    problems = []
    lines: list[str] = []
    if not tar.is_file():
        problems.append(f"{tar}: missing")
    else:
        if tar.stat().st_size != shard.bytes:
            problems.append(f"{tar}: {tar.stat().st_size} bytes instead of {shard.bytes}")
        elif file_sha256(tar) != shard.sha256:
            problems.append(f"{tar}: checksum differs from the manifest")
        lines, bad = _read_tar(split, tar, shard, first=sum(s.samples for s in split.shards[:number]))
        problems += bad
    if not index.is_file():
        problems.append(f"{index}: missing")
    elif tar.is_file() and index.read_text(errors="replace") != "\n".join([f"v1.2 {len(lines)}", *lines, ""]):
        problems.append(f"{index}: does not match its tar")
    return problems


def _read_tar(split: ShardFolder, path: Path, shard: Shard, first: int) -> tuple[list[str], list[str]]:
    """The lines that the index should have, and what is wrong with the samples."""
    samples: dict[str, dict[str, tuple[int, bytes]]] = {}
    problems = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                samples.setdefault(key, {})[extension] = (member.offset_data, file.read() if file else b"")
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(f"{path}: broken after sample {next(reversed(samples), 'none')} ({error})")
    lines = []
    for key, parts in samples.items():
        lines.append(
            " ".join(f"{extension} {offset} {len(data)} {key}.{extension}" for extension, (offset, data) in parts.items())
        )
        wrong = _check_sample(split, {extension: data for extension, (_, data) in parts.items()}, key)
        problems += [f"{path}: sample {key}: {wrong}"] if wrong else []
    expected = [f"{index:09d}" for index in range(first, first + shard.samples)]
    missing = [key for key in expected if key not in samples]
    if missing:
        problems.append(
            f"{path}: {len(missing)} samples missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    elif list(samples) != expected:
        problems.append(f"{path}: samples are not those from {expected[0]} to {expected[-1]} in this order")
    return lines, problems


def _check_sample(split: ShardFolder, parts: dict[str, bytes], key: str) -> str:
    """What is wrong with a sample; empty if nothing is."""
    expected = [split.image_extension, "cls", "index"] + (["json"] if split.factors else [])
    if list(parts) != expected:
        return f"has {', '.join(parts)} instead of {', '.join(expected)}"
    try:
        decode(parts[split.image_extension], split.image_extension)
        label, index = int(parts["cls"]), int(parts["index"])
    except ValueError as error:
        return str(error)
    if not -1 <= label < len(split.classes or ()):
        return f"label {label} has no class"
    return "" if index == int(key) else f"index {index} differs from the key"


def _splits(folder: Path) -> list[ShardFolder]:
    holders = sorted({file.parent for pattern in ("*/manifest.json", "*/*.tar") for file in folder.glob(pattern)})
    if (folder / "manifest.json").is_file() or not holders:
        holders = [folder]
    return [ShardFolder.from_manifest(holder) for holder in holders]


def _strays(split: ShardFolder) -> list[str]:
    listed = {name for shard in split.shards for name in (shard.name, shard.index_name)} | {"manifest.json"}
    return [f"{split.path / name}: not in the manifest" for name in sorted(set(os.listdir(split.path)) - listed)]


if __name__ == "__main__":
    exit_with_one_line(check)

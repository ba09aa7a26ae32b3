"""What a folder of shards holds, read with webdataset and tarfile."""

import tarfile
from pathlib import Path

from trainer.data.shards import ShardFolder

IMAGES = ("jpg", "png", "webp")


def stored(folder: Path) -> list[dict]:
    """Every sample, decoded."""
    import webdataset

    split = ShardFolder.open(folder)
    return list(webdataset.WebDataset(split.tar_paths, shardshuffle=False).decode("rgb8"))


def files(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encoded(folder: Path) -> dict[bytes, int]:
    """Encoded image -> label of every sample of a split."""
    found = {}
    for tar_path in ShardFolder.open(folder).tar_paths:
        with tarfile.open(tar_path) as tar:
            data = {member.name: tar.extractfile(member).read() for member in tar}
        found |= {
            data[f"{key}.{kind}"]: int(data[f"{key}.cls"])
            for key, _, kind in (n.partition(".") for n in data)
            if kind in IMAGES
        }
    return found

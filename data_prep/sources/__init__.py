"""Where images come from. Opening a source costs its names and labels; nothing is decoded until `read`."""

from collections.abc import Callable

from data_prep.sources.csv_manifest import open_csv
from data_prep.sources.drawn import open_drawn
from data_prep.sources.folder import open_folder
from data_prep.sources.official import download, open_cifar10, open_cifar100, open_stl10
from data_prep.sources.source import Options, Source
from trainer.errors import UserError


def _open_parquet(options: Options) -> Source:
    from data_prep.sources.parquet import open_parquet  # pyarrow takes a second to load

    return open_parquet(options)


OPENERS: dict[str, Callable[[Options], Source]] = {
    "cifar10": open_cifar10,
    "cifar100": open_cifar100,
    "stl10": open_stl10,
    "imagefolder": open_folder,
    "parquet": _open_parquet,
    "csv": open_csv,
    "synthetic": open_drawn,
}
TAKEN_BY = {  # flags that not every source takes
    "manifest": ("csv",),
    "image_column": ("csv", "parquet"),
    "label_column": ("csv", "parquet"),
    "unlabelled": ("csv", "parquet", "imagefolder"),
    "download": ("cifar10", "cifar100", "stl10"),
}


def open_source(name: str, options: Options) -> Source:
    """Open a source by name.

    Raises:
        UserError: unknown name, a flag of other sources, nothing of that kind in the root.
    """
    if name not in OPENERS:
        raise UserError(f"--source is {name!r}", f"one of {', '.join(OPENERS)}", "Correct it.")
    for flag, sources in TAKEN_BY.items():
        if getattr(options, flag) and name not in sources:
            raise UserError(f"--{flag} with --source {name}", ", ".join(sources), f"Leave --{flag} out.")
    root, optional = options.root, name in ("csv", "synthetic")
    if options.download and root:
        download(name, root)
    if not (optional if root is None else root.is_dir()):
        raise UserError(f"--root is {root}", f"the folder of {name}", "Give the folder that holds the data.")
    return OPENERS[name](options)

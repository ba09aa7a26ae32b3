"""Prints docs/settings.md: every setting with its default, meaning and range."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any, Literal

from trainer.config import Run
from trainer.objectives.objective import registry

HEAD = "| key | default | meaning | range |\n|---|---|---|---|"


def rows(cls: type, prefix: str) -> Iterator[str]:
    """A line of Markdown for every field, a section for every nested dataclass."""
    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        hint, key = hints[each.name], f"{prefix}{each.name}"
        if dataclasses.is_dataclass(hint):
            yield f"\n## {key}\n\n{(hint.__doc__ or '').splitlines()[0]}\n\n{HEAD}"
            yield from rows(typing.cast(type, hint), f"{key}.")
        else:
            yield f"| `{key}` | `{default(each)}` | {each.metadata['about']} | {bounds(hint, each.metadata)} |"


def default(field: dataclasses.Field) -> str:
    """The default as one would write it."""
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else json.dumps(field.default)


def bounds(hint: Any, metadata: typing.Mapping[str, Any]) -> str:
    """The values allowed."""
    low, high = metadata["low"], metadata["high"]
    if typing.get_origin(hint) is Literal:
        return ", ".join(typing.get_args(hint))
    if low is None:
        return ""
    return f"{low} to {high}" if high is not None else f"from {low}"


if __name__ == "__main__":
    print("# Settings\n\nMade by `make docs`. Any of them is a flag of launch/train.py: `--data.batch_size 512`.\n")
    print("\n".join([HEAD, *rows(Run, "")]))
    for name, objective in sorted(registry().items()):
        print("\n".join([f"\n## objective, when its name is {name}\n", HEAD, *rows(objective.Settings, "objective.")]))

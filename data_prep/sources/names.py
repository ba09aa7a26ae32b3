"""Millions of paths in little memory."""

from array import array
from os import fsdecode, fsencode


class Names:
    """Paths, packed: each takes its bytes and 8 more."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, name: str) -> None:
        """Add one, which may hold bytes that are no text."""
        self._bytes += fsencode(name)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return fsdecode(bytes(self._bytes[self._ends[number] : self._ends[number + 1]]))

"""What was written to a folder: a line for each file, that a run which was killed leaves behind for the next one."""

import errno
import json
import os
import time
from array import array
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audiomae.data.preparation.placing import stable_hash


class Entry(NamedTuple):
    """A file that was written.

    Attributes:
        source: Hash of the name of what it was made from.
        source_bytes: Size of that.
        source_time: When that was changed last, ns since 1970.
        bytes: Its own size.
        frames: Its samples.
        clipped: How many of them were beyond what its format holds.
    """

    source: int = 0
    source_bytes: int = 0
    source_time: int = 0
    bytes: int = 0
    frames: int = 0
    clipped: int = 0


_NUMBERS = len(Entry._fields) + 1  # of a line; the last is the time, ns since 1970


class Journal:
    """Files that were written. Any number of processes add to it, each in a file of its own.

    Eight numbers a line are kept in memory.

    Args:
        folder: Where the journal is. Lines that a killed process left half written do not count.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: FileIO | None = None
        self._owner = -1
        hashes, numbers = array("Q"), array("q")
        for place, line in self._read():
            hashes.append(stable_hash(place))
            numbers.extend(line)
        keys, table = np.array(hashes, np.uint64), np.array(numbers, np.int64).reshape(-1, _NUMBERS)
        order = np.lexsort((table[:, -1], keys))  # by place, then by time
        self._keys, self._entries = keys[order], table[order, :-1]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, place: str) -> Entry | None:
        """Find what earlier runs wrote last, or were about to write, at a place."""
        key = np.uint64(stable_hash(place))
        last = int(np.searchsorted(self._keys, key, side="right")) - 1
        return Entry(*self._entries[last].tolist()) if last >= 0 and self._keys[last] == key else None

    def add(self, place: str, entry: Entry) -> None:
        """Note what is about to get its place.

        Raises:
            OSError: The journal cannot be written, as on a full disk.
        """
        if self._file is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._file = (self._folder / f"journal-{self._owner}.jsonl").open("ab", buffering=0)
        # In front, the line's end also ends one that an earlier process of this number left half written.
        line = b"\n" + json.dumps([place, *entry, time.time_ns()]).encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def places(self) -> Iterator[str]:
        """Yield each place that was ever written to, some more than once."""
        return (place for place, _ in self._read())

    def _read(self) -> Iterator[tuple[str, list[int]]]:
        for path in sorted(self._folder.glob("journal-*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    try:
                        place, *numbers = json.loads(line)
                    except (ValueError, TypeError):
                        continue
                    if list(map(type, numbers)) == [int] * _NUMBERS:
                        yield place, numbers

"""The output folder of a run: one run at a time, and nothing left of those that were killed."""

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TextIO

from audiomae.atomic import remove_leftovers

LOCK = ".lock"
# What file systems without locks say.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUseError(OSError):
    """A folder in which another process runs; the message names it."""


class RunFolder:
    """An output folder that can be locked; a context manager that gives the lock up.

    The lock is the kernel's, of this process alone: reading processes do not inherit it, and a process that was killed
    holds it no longer. What such a one left half written is removed.

    Args:
        path: The folder; made if missing.

    Attributes:
        notes: Lines that tell what was found.
    """

    def __init__(self, path: Path):
        self.path = path
        self.notes: list[str] = []
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def lock(self) -> None:
        """Lock the folder.

        Raises:
            FolderInUseError: Another process has it.
            OSError: It cannot be made or written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # Opened once: closing any other descriptor of the file would give up the lock.
        file = (self.path / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno in _NO_LOCKS:
                self.notes = [f"the file system of {self.path} has no locks: see to it that no other run writes there"]
                return
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise FolderInUseError(
                    f"{self.path} is in use{_describe(holder)}: wait for it to end, or choose another --output-dir"
                ) from error
            raise
        self._file = file
        file.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n")
        file.flush()
        if removed := remove_leftovers(self.path):
            self.notes = [f"removed what a killed run left half written: {', '.join(removed)}"]


def _describe(holder: str) -> str:
    """Tell who holds a lock, where it says so."""
    with suppress(ValueError, KeyError, TypeError):
        facts = json.loads(holder)
        return f" by process {facts['process']} on {facts['host']} since {facts['since']}"
    return ""

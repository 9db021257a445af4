"""The output folder of a run: one run at a time, and nothing left of those that were killed."""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TextIO

from audiomae.atomic import remove_leftovers
from audiomae.locks import NoLocksError, try_lock

LOCK = ".lock"
PARTS = ("pictures", "valid", "test")
"""Folders within it that are the run's own."""
LEASE = 120.0
"""Seconds that the lock of a machine that died may outlive it on a file server, NFS's 90 among them."""


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
            self._wait_for(file)
        except NoLocksError as error:
            file.close()
            self.notes = [str(error)]
            return
        except OSError:
            file.close()
            raise
        self._file = file
        file.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n")
        file.flush()
        if removed := remove_leftovers(self.path, *(self.path / part for part in PARTS)):
            names = ", ".join(str(path.relative_to(self.path)) for path in removed)
            self.notes = [f"removed what a killed run left half written: {names}"]

    def _wait_for(self, file: TextIO) -> None:
        """Lock a file, at once, or where another machine has it, by the time that it would have lost it if it died."""
        deadline: float | None = None
        while not try_lock(file, self.path):
            holder = _read_holder(file)
            used = f"{self.path} is in use{_describe(holder)}"
            elsewhere = holder.get("host") not in (None, socket.gethostname())
            if not elsewhere or (deadline is not None and time.monotonic() > deadline):
                raise FolderInUseError(f"{used}: wait for it to end, or choose another --output-dir")
            if deadline is None:
                deadline = time.monotonic() + LEASE
                print(f"{used}: waiting {LEASE:.0f} s for it", file=sys.stderr)
            time.sleep(1)


def _read_holder(file: TextIO) -> dict[str, Any]:
    """Who holds a lock, as it says; empty where it does not."""
    file.seek(0)
    with suppress(ValueError):
        facts = json.loads(file.read())
        if isinstance(facts, dict):
            return facts
    return {}


def _describe(holder: dict[str, Any]) -> str:
    with suppress(KeyError):
        return f" by process {holder['process']} on {holder['host']} since {holder['since']}"
    return ""

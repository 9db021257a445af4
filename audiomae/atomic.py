"""Files that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIX = ".tmp"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class NoSpaceError(OSError):
    """A disk is full; the message says what to do."""

    @classmethod
    def at(cls, path: Path) -> "NoSpaceError":
        """The error of a file that cannot be written, or of a folder in which one cannot."""
        free = shutil.disk_usage(path if path.is_dir() else path.parent).free / 2**20
        return cls(
            f"no space is left to write {path} ({free:,.0f} MiB are free): every file that was there is whole; "
            "make room, then go on"
        )


@contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes ``path`` at the end: at no time is there half a file.

    What was written is on the disk before it gets its name, so that neither a crash of the machine nor one of the
    process leaves anything but the old file or the new one.

    Args:
        path: What to write.
        previous: Where the old file goes; None drops it. Between the two renamings, the old one alone is there.

    Raises:
        FileNotFoundError: No such directory.
        NoSpaceError: The disk is full.
        OSError: Another error of the file system.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {path.parent}")
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        yield temporary
        _flush(temporary)
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
        with suppress(OSError):  # some file systems cannot flush a directory
            _flush(path.parent)
    except OSError as error:
        if not is_full(error):
            raise
        temporary.unlink(missing_ok=True)
        raise NoSpaceError.at(path) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether an error is that of a full disk or a used up quota."""
    return error.errno in _NO_SPACE


def remove_leftovers(*folders: Path) -> list[Path]:
    """Remove what killed processes left half written in folders, and tell which; no other may be writing there."""
    left = [path for folder in folders for path in folder.glob(f"*.*{_SUFFIX}") if path.suffixes[-2][1:].isdigit()]
    for path in left:
        path.unlink(missing_ok=True)
    return left


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

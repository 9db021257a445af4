"""Locks of the kernel: a process that was killed holds them no longer, and those that it starts do not inherit them."""

import errno
import fcntl
from pathlib import Path
from typing import TextIO

_HELD = (errno.EACCES, errno.EAGAIN)
# What file systems without locks say.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class NoLocksError(OSError):
    """A file system has no locks."""


def try_lock(file: TextIO, folder: Path) -> bool:
    """Lock a file for this process alone, if no other one has it. Closing any descriptor of it gives the lock up.

    Args:
        file: Open for writing.
        folder: What the lock stands for.

    Returns:
        Whether this process has it now.

    Raises:
        NoLocksError: The file system has none.
        OSError: Another error of the file system.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LOCKS:
            raise NoLocksError(
                f"the file system of {folder} has no locks: see to it that no other run writes there"
            ) from error
        raise
    return True

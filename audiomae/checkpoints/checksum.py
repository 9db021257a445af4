"""``torch.save`` files that carry the SHA-256 of their bytes.

Such a file is a zip archive, and the checksum is the archive's comment: one file, so that neither can be there without
the other, and every reader of zip archives and of ``torch.save`` files still reads it. A zip's own CRCs would not do:
they leave out its directory, and PyTorch does not check them.
"""

import hashlib
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

_PREFIX = b"sha256:"
_COMMENT_SIZE = len(_PREFIX) + 2 * hashlib.sha256().digest_size
_NO_COMMENT = (0).to_bytes(2, "little")
"""Length of the comment, with which an archive without one ends."""
_COMMENT_LENGTH = _COMMENT_SIZE.to_bytes(2, "little")


class _Hashed:
    """A file to write to, and the hash of what was written."""

    def __init__(self, file: BinaryIO):
        self.hash = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_with_checksum(content: Any, path: Path) -> None:
    """Write a ``torch.save`` file with its checksum.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("wb") as file:
        hashed = _Hashed(file)
        try:
            torch.save(content, cast(IO[bytes], hashed))
        except RuntimeError as error:  # PyTorch's own, which does not tell that the disk is full
            if hashed.error is not None:
                raise hashed.error from error
            raise
        file.seek(-len(_NO_COMMENT), 1)
        file.write(_COMMENT_LENGTH + _PREFIX + hashed.hash.hexdigest().encode())


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_checksum(path: Path) -> bool:
    """Whether a file ends in a checksum; it can be wrong."""
    return _stored(path) is not None


def checksum_matches(path: Path) -> bool:
    """Whether a file's bytes are those that its checksum was made of; True for a file without one.

    Raises:
        OSError: It cannot be read.
    """
    stored = _stored(path)
    if stored is None:
        return True
    with path.open("rb") as file:
        left = path.stat().st_size - len(_COMMENT_LENGTH) - _COMMENT_SIZE
        found = hashlib.sha256()
        while left and (block := file.read(min(left, 1 << 20))):
            found.update(block)
            left -= len(block)
    found.update(_NO_COMMENT)
    return found.hexdigest().encode() == stored


def _stored(path: Path) -> bytes | None:
    size = len(_COMMENT_LENGTH) + _COMMENT_SIZE
    if path.stat().st_size < size:
        return None
    with path.open("rb") as file:
        file.seek(-size, 2)
        tail = file.read()
    begin = _COMMENT_LENGTH + _PREFIX
    return tail[len(begin) :] if tail.startswith(begin) else None

"""Clips as 16-bit mono files of one sample rate, each written whole or not at all, and not again where it is there."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile as sf

from audiomae.data.manifests import Manifest
from audiomae.data.preparation.journal import Entry, Journal
from audiomae.data.preparation.placing import Places, stable_hash
from audiomae.data.sound_files import ClipError
from audiomae.data.streams import open_stream

_BLOCK = 1 << 18  # samples
_MAX_WAV_BYTES = 2**32 - 4096  # its header counts bytes in 32 bits
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What file systems say of names that they cannot hold: too long a one, or characters that others take.
_NO_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


class Outcome(NamedTuple):
    """What became of a clip.

    Attributes:
        kind: "written"; "again" where it takes the place of another file, as of an earlier version of its own; "kept"
            where it was there; "failed"; "repeated" where an earlier clip of the manifest is the same sound; and
            "stopped" where nothing can be written any more.
        entry: The file that is there now.
        reason: Why it failed or stopped.
    """

    kind: Literal["written", "again", "kept", "failed", "repeated", "stopped"]
    entry: Entry = Entry()
    reason: str = ""


class Converter:
    """Converts clips, in any process.

    Args:
        manifest: The clips.
        places: Where they go.
        out: The output folder.
        temporary: Folder of files that are being written, in the same file system; no others may be there.
        journal: What earlier runs wrote.
        sample_rate: Of what is written, Hz.
        container: "flac" or "wav".
    """

    def __init__(
        self,
        manifest: Manifest,
        places: Places,
        *,
        out: Path,
        temporary: Path,
        journal: Journal,
        sample_rate: int,
        container: Literal["flac", "wav"],
    ):
        self.manifest, self.places, self.out, self.temporary = manifest, places, out, temporary
        self.journal, self.sample_rate, self.container = journal, sample_rate, container

    def __call__(self, clips: Sequence[int]) -> list[Outcome]:
        """Convert clips; there is nothing after the first one that is "stopped"."""
        outcomes = []
        for clip in clips:
            try:
                outcome = self._convert(clip)
            except ClipError as error:
                outcome = Outcome("failed", reason=str(error).removeprefix(f"{self.manifest.path(clip)}: "))
            except OSError as error:
                outcome = Outcome("stopped", reason=self._why_stopped(error))
            outcomes.append(outcome)
            if outcome.kind == "stopped":
                break
        return outcomes

    def _convert(self, clip: int) -> Outcome:
        if self.places.first[clip] != clip:
            return Outcome("repeated")
        path, place = self.manifest.path(clip), self.places[clip]
        source = stable_hash(self.places.source(clip)) >> 1  # a signed number
        target = self.out / place
        with _name_errors(path, target):
            size = _size(target)
        known = self.journal.find(place)
        if known is not None and (known.source, known.bytes) != (source, size):
            known = None
        try:
            found = os.stat(path)
        except OSError as error:
            if known is not None and isinstance(error, FileNotFoundError):  # nobody needs it any more
                return Outcome("kept", known)
            raise ClipError(f"{path}: {error.strerror}") from error
        if known is not None and (known.source_bytes, known.source_time) == (found.st_size, found.st_mtime_ns):
            return Outcome("kept", known)
        temporary = self.temporary / f"{os.getpid()}.{self.container}"
        try:
            frames, clipped = self._write(path, self.manifest.segment(clip), temporary)
            entry = Entry(source, found.st_size, found.st_mtime_ns, _flushed_size(temporary), frames, clipped)
            with _name_errors(path, target):
                target.parent.mkdir(parents=True, exist_ok=True)
                # Wherever this stops, a file of the size that the journal tells of is the one that it tells of.
                target.unlink(missing_ok=True)
            self.journal.add(place, entry)
            with _name_errors(path, target):
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
            temporary.with_suffix(".probe").unlink(missing_ok=True)
        return Outcome("written" if size is None else "again", entry)

    def _write(self, path: str, segment: tuple[float, float | None], target: Path) -> tuple[int, int]:
        """Write a clip; returns its samples, and how many of them 16 bits cannot hold."""
        clipped = 0
        with open_stream(path, self.sample_rate, segment) as stream:
            if self.container == "wav" and 2 * stream.length > _MAX_WAV_BYTES:
                raise ClipError(
                    f"{path}: lasts {stream.seconds / 3600:.4g} h, more than a WAV file can hold: take --format flac"
                )
            settings = {"subtype": "PCM_16", "format": self.container.upper()}
            with _system_errors(target), sf.SoundFile(target, "w", self.sample_rate, 1, **settings) as file:
                for block in stream.blocks(_BLOCK):
                    # Rounded to the nearest; of 16-bit sound at this rate, exactly what it was.
                    levels = np.rint(block.numpy() * np.float32(2**15))
                    clipped += int(np.count_nonzero((levels < -(2**15)) | (levels > 2**15 - 1)))
                    file.write(levels.clip(-(2**15), 2**15 - 1).astype(np.int16))
        return stream.length, clipped

    def _why_stopped(self, error: OSError) -> str:
        if error.errno in _FULL:
            free = shutil.disk_usage(self.out).free
            return (
                f"no space is left in {self.out} ({free / 2**20:,.0f} MiB are free): every file there is whole; make "
                "room and run the same command again, which goes on"
            )
        return f"{self.out} cannot be written ({error}): every file there is whole, and the same command goes on"


@contextmanager
def _name_errors(path: str, target: Path) -> Iterator[None]:
    """Make an error that the name of a clip's new file brings about one of that clip: others may be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_NAME:
            raise
        raise ClipError(f"{path}: cannot be written as {target} ({error.strerror})") from error


@contextmanager
def _system_errors(target: Path) -> Iterator[None]:
    """Find out what the system said of a file that libsndfile could not write."""
    try:
        yield
    except sf.LibsndfileError as error:
        # On a full disk this fails too, as long as the half-written file is there.
        with target.with_suffix(".probe").open("wb") as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
        raise OSError(f"libsndfile: {error.error_string.rstrip('.')}") from error


def _size(path: Path) -> int | None:
    """Size of a file, None for no such file."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _flushed_size(path: Path) -> int:
    """Size of a file, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size

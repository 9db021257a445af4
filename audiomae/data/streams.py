"""Clips of any length from their first to their last sample, in blocks, without a seek in between."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile as sf
import torch

from audiomae.data.sound_files import ClipError, SoundClip, decode_next, open_sound, skip_next


class ClipStream(SoundClip):
    """An open file or a part of it as mono samples at one sample rate, which come in order and once.

    Attributes:
        length: Samples of the clip.
        seconds: Its length.
        file_rate: Sample rate of the file, Hz.
        channels: Channels of the file.
        format: Container and sample format of the file.
    """

    def __init__(self, path: str, file: sf.SoundFile, sample_rate: int, segment: tuple[float, float | None]):
        super().__init__(path, file, sample_rate, segment)
        self.seconds, self.file_rate, self.channels = self.length / sample_rate, file.samplerate, file.channels
        self.format = f"{file.format} {file.subtype}"
        self._decoded, self._end = np.empty(0, np.float32), -1  # the newest samples of the file, before sample ``_end``

    def blocks(self, size: int) -> Iterator[torch.Tensor]:
        """Yield all samples, ``size`` at a time, float32; the last block may be shorter.

        Joined, they are those that ``read_waveform`` gives for the whole clip, also in formats where a seek is not
        exact.

        Raises:
            ClipError: For a file that is cut off, or holds samples that are not finite.
        """
        for first in range(0, self.length, size):
            yield self.read(first, min(size, self.length - first))

    def find_sound(self, size: int) -> None:
        """Read on, ``size`` samples at a time, until not all of them are one value.

        Raises:
            SilentClipError: They are, to the end of the clip.
            ClipError: As ``blocks``.
        """
        for _ in self.blocks(size):
            if self._varies:
                return
        self.check_sound(0, self.length)

    def _decode(self, first: int, count: int) -> np.ndarray:
        """Decode on from where the last block ended. Its end may be needed again, for the filter of a resampler."""
        if self._end < 0 and self._file.seekable():
            samples = super()._decode(first, count)
        else:
            if self._end < 0:
                skip_next(self._file, first)
                self._end = first
            new = decode_next(self._file, first + count - self._end)
            samples = np.concatenate([self._decoded[len(self._decoded) - (self._end - first) :], new])
            if len(samples) < count:
                raise ClipError(
                    f"{self._path}: cut off, its header tells of {self._file.frames} samples, "
                    f"but it ends after sample {first + len(samples)}"
                )
            self._check_range(new)
        self._decoded, self._end = samples, first + count
        return samples


@contextmanager
def open_stream(path: str, sample_rate: int, segment: tuple[float, float | None] = (0.0, None)) -> Iterator[ClipStream]:
    """Open a clip to read it from its first to its last sample.

    Args:
        path: Any file that libsndfile reads.
        sample_rate: Sample rate of the samples, Hz.
        segment: Start and duration of a part of the file, in seconds.

    Raises:
        ClipError: For a file that is missing, no audio or empty, or a part beyond its end; while its samples are read,
            for one that cannot be decoded.
    """
    with open_sound(path) as file:
        yield ClipStream(path, file, sample_rate, segment)

"""Sound files as mono samples: any format that libsndfile knows, sample rate, number of channels, and length."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F

from audiomae.data.resample import cached_resampler

# Headers of broken files tell of more, as of libsndfile's SF_COUNT_MAX; these are 66 days at 192 kHz.
_MAX_FRAMES = 1 << 40
_MAX_RATE = 1_000_000
# No integer format has larger samples, whatever somebody scales them by; spectrograms of 1e18 overflow float32.
_MAX_AMPLITUDE = 2.0**32
# libsndfile reads the rest of a cut WAV, AIFF or AU as if it were the whole, and tells of it in its log alone.
_CUT = re.compile(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
# What a program writes that does not know the length beforehand, as ffmpeg and sox do into a pipe.
_UNKNOWN_BYTES = 0x7FFF0000
_BLOCK_VALUES = 1 << 20  # samples of all channels that are decoded at once
# After a seek in an MP3, libsndfile decodes the first frames without the earlier ones that they take bits from, and
# returns noise: up to ten frames of 1,152 samples at usual bit rates. So decoding starts some frames early.
_MP3_PREROLL = 16 * 1152


class ClipError(OSError):
    """A clip that cannot be read; the message names the file and the reason.

    Attributes:
        clip: Its number in the manifest that it was read from; None where a file was read by its path.
    """

    clip: int | None = None


class SilentClipError(ClipError):
    """A clip of which all that was read is silent."""


class _SoundFile(sf.SoundFile):
    """A sound file whose errors are those of a clip, and that is read on from where it is.

    After each read soundfile seeks to where it is anyway. In compressed formats that takes time, and in lossy ones the
    next samples are others than without it.
    """

    def __init__(self, path: str):
        self._path, self._reads = path, False
        with _clip_errors(path):
            super().__init__(os.fsencode(path))

    def read(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Read the next samples; their number must be given."""
        self._reads = True
        try:
            with _clip_errors(self._path):
                return super().read(*args, **kwargs)
        finally:
            self._reads = False

    def seek(self, *args: Any, **kwargs: Any) -> int:
        """Go to a sample."""
        with _clip_errors(self._path):
            return super().seek(*args, **kwargs)

    def seekable(self) -> bool:
        """Whether the file can be sought in."""
        return not self._reads and super().seekable()


@contextmanager
def _clip_errors(path: str) -> Iterator[None]:
    try:
        yield
    except sf.LibsndfileError as error:
        raise ClipError(f"{path}: {_reason(path, error)}") from error


def _reason(path: str, error: sf.LibsndfileError) -> str:
    try:
        with open(path, "rb"):
            return f"cannot be read as audio ({error.error_string.rstrip('.')})"
    except OSError as os_error:  # libsndfile calls every one of them "System error"
        return str(os_error.strerror)


@contextmanager
def open_sound(path: str) -> Iterator[_SoundFile]:
    """Open a sound file whose header tells of a length and sample rate that can be."""
    if path.lower().endswith(".raw"):  # by the name alone, soundfile would ask for a sample rate
        raise ClipError(f"{path}: raw audio has no header and cannot be read")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ClipError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):  # opening a pipe would wait for somebody to write to it
        raise ClipError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
    with _SoundFile(path) as file:
        if file.frames < 1:
            raise ClipError(f"{path}: holds no samples")
        if file.frames > _MAX_FRAMES:
            raise ClipError(f"{path}: its header does not tell its length; write it anew, for example with ffmpeg")
        if file.samplerate > _MAX_RATE:
            raise ClipError(f"{path}: sample rate of {file.samplerate} Hz, at most {_MAX_RATE} Hz can be read")
        _check_whole(path, file.extra_info)
        yield file


def _check_whole(path: str, log: str) -> None:
    """Raise ClipError if libsndfile's log tells of samples that the file lacks: more than a recorder miscounts."""
    if cut := _CUT.search(log):
        told, there = map(int, cut.groups())
        if there < 0.99 * told and told < _UNKNOWN_BYTES:
            raise ClipError(f"{path}: cut off, its header tells of {told} bytes of samples, but it holds {there}")


class SoundClip:
    """An open file or a part of it, ``(start, duration)`` in seconds, seen as mono samples at one sample rate."""

    def __init__(
        self, path: str, file: sf.SoundFile, sample_rate: int, segment: tuple[float, float | None] = (0.0, None)
    ):
        self._path, self._file, self._rate = path, file, sample_rate
        self._resampler = None if file.samplerate == sample_rate else cached_resampler(file.samplerate, sample_rate)
        whole = file.frames if self._resampler is None else self._resampler.length(file.frames)
        start, duration = segment
        self._first = round(start * sample_rate)
        self.length = whole - self._first
        if self.length < 1:
            raise ClipError(f"{path}: lasts {whole / sample_rate:.4g} s, expected a part of it from {start:.4g} s on")
        if duration is not None:
            self.length = min(self.length, round(duration * sample_rate))
        if self.length < 1:
            raise ClipError(f"{path}: a part of {duration:.4g} s is less than a sample at {sample_rate} Hz")
        # Of the file's own samples that were read: how many, the first, and whether another one differs from it.
        self._heard, self._level, self._varies = 0, np.float32(0), False

    def read(self, first: int, count: int) -> torch.Tensor:
        """Samples [first, first + count), which must lie inside the clip; decodes little more than they need."""
        first += self._first
        if self._resampler is None:
            samples = self._decode(first, count)
            self._listen(samples)
            return torch.from_numpy(samples)
        begin, end = self._resampler.span(first, count)
        inside = max(begin, 0), min(end, self._file.frames)
        samples = self._decode(inside[0], inside[1] - inside[0])
        # Without those before the first one and after the last one, which the resampler takes for its filter.
        own = -(-first * self._file.samplerate // self._rate), (first + count - 1) * self._file.samplerate // self._rate
        self._listen(samples[own[0] - inside[0] : own[1] + 1 - inside[0]])
        padded = F.pad(torch.from_numpy(samples), (inside[0] - begin, end - inside[1]))
        return self._resampler(padded, first, count)

    def _listen(self, samples: np.ndarray) -> None:
        """Keep in mind whether all samples are equal, which two of them rule out for most clips."""
        if self._varies or not len(samples):
            return
        if not self._heard:
            self._level = samples[0]
        self._heard += len(samples)
        self._varies = bool(samples[len(samples) // 2] != self._level or (samples != self._level).any())

    def check_sound(self, start: int, samples: int) -> None:
        """Raise SilentClipError if all that was read for a crop is one value: without its mean, silence."""
        if self._varies or self._heard < 2:
            return
        parts: list[tuple[int, int]] = []
        if samples < self.length:
            end = start + samples
            parts = [(start, end)] if end <= self.length else [(start, self.length), (0, end - self.length)]
        seconds = [[(self._first + place) / self._rate for place in part] for part in parts]
        told = " and".join(f" from {begin:.2f} s to {end:.2f} s" for begin, end in seconds)
        raise SilentClipError(f"{self._path}: silent{told}")

    def _decode(self, first: int, count: int) -> np.ndarray:
        """Mono float32 samples [first, first + count) at the file's own rate."""
        try:
            if self._file.seekable():
                is_mp3 = self._file.format == "MP3"
                preroll = min(first, _MP3_PREROLL if is_mp3 else 0)
                # Seeking in FLAC decodes; an MP3 gives other samples at its very beginning without.
                if is_mp3 or self._file.tell() != first - preroll:
                    self._file.seek(first - preroll)
                samples = decode_next(self._file, preroll + count)[preroll:]
            else:
                with open_sound(self._path) as file:
                    skip_next(file, first)
                    samples = decode_next(file, count)
        except MemoryError as error:
            raise ClipError(f"{self._path}: its {count} samples do not fit into memory") from error
        if len(samples) < count:
            raise ClipError(
                f"{self._path}: cut off, its header tells of {self._file.frames} samples, "
                f"but it ends before sample {first + count}"
            )
        self._check_range(samples)
        return samples

    def _check_range(self, samples: np.ndarray) -> None:
        """Raise ClipError if samples are no sound."""
        if self._file.subtype == "PCM_16" or not len(samples):
            return
        peak = max(samples.max(), -samples.min())
        if not np.isfinite(peak):
            raise ClipError(f"{self._path}: holds samples that are not finite")
        if peak > _MAX_AMPLITUDE:
            raise ClipError(f"{self._path}: holds a sample of {peak:.4g}, expected at most 1, or {_MAX_AMPLITUDE:.4g}")


def _block_frames(file: sf.SoundFile) -> int:
    return max(_BLOCK_VALUES // file.channels, 1)


def skip_next(file: sf.SoundFile, count: int) -> None:
    """Decode the next samples of a file that cannot be sought in."""
    block = _block_frames(file)
    for skipped in range(0, count, block):
        file.read(min(block, count - skipped), dtype="float32")


def decode_next(file: sf.SoundFile, count: int) -> np.ndarray:
    """The next samples, mono float32, as many as there are; in blocks, since there may be hundreds of channels."""
    # libsndfile takes longer to make floats of 16-bit samples than to read them; NumPy makes the same ones faster.
    is_16_bit = file.subtype == "PCM_16"
    mono = np.empty(count, np.float32)
    if file.channels == 1 and not is_16_bit:
        return file.read(count, out=mono)
    block = np.empty((min(_block_frames(file), count), file.channels), np.int16 if is_16_bit else np.float32)
    done = 0
    with np.errstate(over="ignore", invalid="ignore"):  # whoever called looks at what comes out
        while done < count:
            samples = file.read(min(len(block), count - done), out=block)
            if not len(samples):
                break
            part = mono[done : done + len(samples)]
            # Adding channel by channel takes a tenth of the time that ``samples.mean(axis=1)`` takes.
            part[:] = samples[:, 0]
            for channel in range(1, file.channels):
                part += samples[:, channel]
            done += len(samples)
        mono = mono[:done]
        scale = file.channels * (2**15 if is_16_bit else 1)
        return mono if scale == 1 else np.divide(mono, np.float32(scale), out=mono)

"""Clips of manifests and files, and random crops of them for pre-training."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from audiomae.data.manifests import Manifest
from audiomae.data.sound_files import ClipError, SoundClip, open_sound
from audiomae.seeding import clip_generator


def read_clip(manifest: Manifest, number: int, sample_rate: int, samples: int, start: float = 0.0) -> torch.Tensor:
    """Read a clip of a manifest as mono, or ``samples`` of one that is longer.

    Args:
        manifest: The clips.
        number: Index of the clip.
        sample_rate: Sample rate of the result, Hz.
        samples: Length of the result at most.
        start: Which part of a longer clip: 0 is its first samples, 1 its last ones.

    Returns:
        (at most ``samples``,) float32; integer formats in [-1, 1).

    Raises:
        ClipError: For a file that is missing, no audio, empty, cut off, or holds samples that are not finite or far too
            large.
    """
    with _open_clip(manifest, number, sample_rate) as clip:
        count = min(samples, clip.length)
        return clip.read(round(start * (clip.length - count)), count)


def read_waveform(
    path: str | os.PathLike[str], sample_rate: int, start: float = 0.0, duration: float | None = None
) -> torch.Tensor:
    """Read a clip, or a part of it, as mono at the sample rate wanted.

    Channels are averaged. A part equals the same samples of the whole resampled clip, and only it is decoded.
    Four limits are libsndfile's: near the end of an Ogg Vorbis file a part may come from some 10 ms away, the first
    samples of a part of an Opus file are approximate, an MP3 of variable bit rate without a header that tells its
    length ends where the library guesses, and an MP3 is searched from its beginning, which takes seconds in one of many
    hours.

    Args:
        path: Any file that libsndfile reads (WAV, FLAC, Ogg Vorbis, Opus, MP3, AIFF, ...).
        sample_rate: Sample rate of the result, Hz.
        start: Where to start, seconds.
        duration: How much to read, seconds; less comes back where the clip ends earlier. ``None`` reads to the end.

    Returns:
        (samples,) float32; integer formats in [-1, 1).

    Raises:
        ClipError: For a file that is missing, no audio, empty, cut off, or holds samples that are not finite or far too
            large.
        ValueError: For a sample rate below 1, a start outside the clip, or a duration of less than a sample.
    """
    if sample_rate < 1:
        raise ValueError(f"sample_rate must be at least 1 Hz, got {sample_rate}")
    path = os.fspath(path)
    with open_sound(path) as file:
        clip = SoundClip(path, file, sample_rate)
        first = round(max(-1, min(start * sample_rate, clip.length)))  # no integer is infinite
        if not 0 <= first < clip.length:
            raise ValueError(f"start of {start} s lies outside {path}, which lasts {clip.length / sample_rate} s")
        count = clip.length - first
        if duration is not None:
            count = round(max(0, min(count, duration * sample_rate)))
        if count < 1:
            raise ValueError(f"duration must be at least one sample at {sample_rate} Hz, got {duration} s")
        return clip.read(first, count)


@contextmanager
def _open_clip(manifest: Manifest, number: int, sample_rate: int) -> Iterator[SoundClip]:
    path = manifest.path(number)
    try:
        with open_sound(path) as file:
            yield SoundClip(path, file, sample_rate, manifest.segment(number))
    except ClipError as error:
        error.clip = number
        raise


def _read_cyclic(clip: SoundClip, start: int, samples: int) -> list[torch.Tensor]:
    """Parts of (samples,) from ``start`` on, going round to the clip's beginning as often as it takes."""
    if clip.length < samples:
        return [clip.read(0, clip.length).roll(-start).repeat(-(-samples // clip.length))[:samples]]
    if clip.length == samples:
        whole = clip.read(0, samples)
        return [whole[start:], whole[:start]]
    tail = clip.read(start, min(samples, clip.length - start))
    return [tail] if len(tail) == samples else [tail, clip.read(0, samples - len(tail))]


class ClipDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random crops of clips with a random gain, as in Audio-MAE's pre-training (arXiv 2207.06405).

    ``dataset[epoch, clip]`` gives (waveform (samples,) float32, pair (2,) int64 that holds the epoch and the clip),
    drawn from the seed, the epoch and the clip alone: any number of workers or ranks gives the same samples. Batches
    of ``ClipBatches`` collate to (B, samples) and (B, 2):

        batches = ClipBatches(len(manifest), batch_size=512)
        loader = DataLoader(ClipDataset(manifest, samples=160_000), batch_sampler=batches, num_workers=8)

    Args:
        manifest: The clips.
        sample_rate: Sample rate of the waveforms, Hz.
        samples: Length of the crop, samples at ``sample_rate``; 10 s by default. Shorter clips repeat themselves.
        seed: Seed of the run.
        gain_db: The waveform is multiplied by a gain uniform in [-gain_db, gain_db] decibels; 0 leaves it as it is.
            Nothing is clipped.
        gain: "uniform" is that, the paper's; "beta" multiplies by a draw of Beta(10, 10) + 0.5, as the released code
            does.
        crop: "random" starts anywhere in the clip and goes round at its end, "start" at its first sample.

    Raises:
        ValueError: For a setting that makes no sense.
        ClipError: On access, for a file that is missing, no audio, empty, cut off, or holds samples that are not finite
            or far too large, and for a crop of which all samples are equal; its ``clip`` is the clip's number.
    """

    def __init__(
        self,
        manifest: Manifest,
        sample_rate: int = 16_000,
        samples: int = 160_000,
        seed: int = 0,
        gain_db: float = 6.0,
        gain: Literal["uniform", "beta"] = "uniform",
        crop: Literal["random", "start"] = "random",
    ):
        if sample_rate < 1 or samples < 1:
            raise ValueError(f"sample_rate and samples must be at least 1, got {sample_rate} and {samples}")
        if not (math.isfinite(gain_db) and gain_db >= 0):
            raise ValueError(f"gain_db must be a number of decibels >= 0, got {gain_db}")
        if gain not in ("uniform", "beta"):
            raise ValueError(f'gain must be "uniform" or "beta", got {gain!r}')
        if crop not in ("random", "start"):
            raise ValueError(f'crop must be "random" or "start", got {crop!r}')
        self.manifest = manifest
        self.sample_rate = sample_rate
        self.samples = samples
        self.seed = seed
        self.gain_db = gain_db
        self.gain = gain
        self.crop = crop

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            epoch, number = index
        except TypeError as error:
            raise TypeError(f"a clip is drawn by (epoch, clip), as ClipBatches yields them, got {index!r}") from error
        with _open_clip(self.manifest, number, self.sample_rate) as clip:
            start = 0
            if self.crop == "random":
                start = int(clip_generator(self.seed, epoch, number, "crop").integers(clip.length))
            parts = _read_cyclic(clip, start, self.samples)
            clip.check_sound(start, self.samples)
        draw = clip_generator(self.seed, epoch, number, "gain")
        if self.gain == "beta":
            gain = draw.beta(10, 10) + 0.5
        else:
            gain = 10 ** (draw.uniform(-self.gain_db, self.gain_db) / 20)
        # NumPy takes less time than PyTorch to begin, a twentieth of what 10 s of FLAC take in all.
        waveform, end = np.empty(self.samples, np.float32), 0
        for part in parts:
            begin, end = end, end + len(part)
            np.multiply(part.numpy(), gain, out=waveform[begin:end])
        return torch.from_numpy(waveform), torch.tensor([epoch, number])

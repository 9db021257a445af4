"""Labelled clips for fine-tuning and evaluation, with the augmentation of fine-tuning (arXiv 2207.06405, table 3)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchaudio.functional import add_noise
from torchaudio.transforms import FrequencyMasking, TimeMasking

from audiomae.data.clips import read_clip
from audiomae.data.labels import ClassIds
from audiomae.data.manifests import Manifest
from audiomae.seeding import clip_generator, clip_seed


@dataclass(frozen=True)
class Augmentation:
    """What happens to a clip in fine-tuning, in this order.

    Attributes:
        gain: Multiply the clip by a draw of Beta(10, 10) + 0.5.
        roll: Rotate the clip by a uniform offset; of one that is longer than the input, take a uniform part first.
        mixup: Probability that the clip is mixed with another one of the data set, any as likely as any other.
        mixup_alpha: The clip's share, in waveform and labels, comes from Beta(alpha, alpha).
        noise_db: Signal-to-noise ratio of white noise, dB; None adds none.
        time_mask: SpecAugment removes up to so many frames in a row, less one.
        frequency_mask: The same for mel bins.
    """

    gain: bool = False
    roll: bool = False
    mixup: float = 0.0
    mixup_alpha: float = 10.0
    noise_db: float | None = None
    time_mask: int = 0
    frequency_mask: int = 0


class Example(NamedTuple):
    """A labelled clip; batches hold the same with a leading axis B.

    Attributes:
        waveform: ``(samples,)`` float32, zero beyond ``length``.
        length: Samples of the clip itself, int64.
        target: ``(classes,)`` float32: 1 for the clip's classes, or shares of a mix.
        keep_frames: ``(frames,)`` bool, False where SpecAugment removes a frame.
        keep_mels: ``(mel bins,)`` bool, False where it removes a mel bin.
        pair: ``(2,)`` int64: epoch and clip.
    """

    waveform: Tensor
    length: Tensor
    target: Tensor
    keep_frames: Tensor
    keep_mels: Tensor
    pair: Tensor


class LabelledClips(Dataset[Example]):
    """Clips with their classes. ``dataset[epoch, clip]`` is drawn from the seed, the epoch and the clip alone.

    Args:
        manifest: The clips.
        classes: The classes of each.
        sample_rate: Sample rate of the waveforms, Hz.
        samples: Length of the waveforms. Longer clips are cut, at the beginning unless they are rolled; shorter ones
            are padded.
        spec_size: Frames and mel bins of the spectrograms that SpecAugment is drawn for.
        augmentation: None takes clips as they are.
        seed: Seed of the run.

    Raises:
        ValueError: SpecAugment that may remove more than there is.
        ClipError: On access, for a file that is missing, no audio, empty, cut off, or holds samples that are not finite
            or far too large; its ``clip`` is the clip's number, or that of the partner that cannot be read. Silence may
            be a class and is none of these.
    """

    def __init__(
        self,
        manifest: Manifest,
        classes: ClassIds,
        *,
        sample_rate: int,
        samples: int,
        spec_size: tuple[int, int],
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        self.manifest, self.classes, self.sample_rate, self.samples = manifest, classes, sample_rate, samples
        self.spec_size, self.augmentation, self.seed = spec_size, augmentation or Augmentation(), seed
        widths = (self.augmentation.time_mask, self.augmentation.frequency_mask)
        for name, width, size in zip(("time_mask", "frequency_mask"), widths, spec_size, strict=True):
            if width > size:
                raise ValueError(f"{name} is {width}, expected at most the {size} of a spectrogram")

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: tuple[int, int]) -> Example:
        epoch, clip = index
        settings = self.augmentation
        waveform, target = self._read(epoch, clip, clip), self._target(clip)
        draw = clip_generator(self.seed, epoch, clip, "mixup")
        if draw.random() < settings.mixup:
            partner = int(draw.integers(len(self)))
            share = float(draw.beta(settings.mixup_alpha, settings.mixup_alpha))
            other = self._read(epoch, clip, partner)[: len(waveform)]
            # The clip keeps its length; a shorter partner ends earlier.
            waveform = share * waveform + (1 - share) * F.pad(other, (0, len(waveform) - len(other)))
            target = share * target + (1 - share) * self._target(partner)
        if settings.noise_db is not None:
            noise = clip_generator(self.seed, epoch, clip, "noise").standard_normal(len(waveform), dtype=np.float32)
            waveform = add_noise(waveform, torch.from_numpy(noise), torch.tensor(float(settings.noise_db)))
        keep_frames, keep_mels = self._spec_augment(epoch, clip)
        return Example(
            F.pad(waveform, (0, self.samples - len(waveform))),
            torch.tensor(len(waveform)),
            target,
            keep_frames,
            keep_mels,
            torch.tensor([epoch, clip]),
        )

    def _read(self, epoch: int, visit: int, clip: int) -> Tensor:
        """Read a clip for the visit of another or the same one."""
        whose = "" if clip == visit else "partner "
        roll = clip_generator(self.seed, epoch, visit, f"{whose}roll")
        start = roll.random() if self.augmentation.roll else 0.0
        waveform = read_clip(self.manifest, clip, self.sample_rate, self.samples, start=start)
        if self.augmentation.roll:
            waveform = waveform.roll(int(roll.integers(len(waveform))))
        if self.augmentation.gain:
            waveform = waveform * (clip_generator(self.seed, epoch, visit, f"{whose}gain").beta(10, 10) + 0.5)
        return waveform

    def _target(self, clip: int) -> Tensor:
        target = torch.zeros(self.classes.num_classes)
        target[torch.from_numpy(self.classes[clip])] = 1
        return target

    def _spec_augment(self, epoch: int, clip: int) -> tuple[Tensor, Tensor]:
        """Which frames and mel bins stay.

        torchaudio's transforms remove the same frames of all mel bins and the other way round, so that they need see
        but one of each; the batch is masked where its spectrograms are made.
        """
        frames, mels = self.spec_size
        # They draw from PyTorch's generator, which is left as it was. torch.manual_seed would also queue a seed and the
        # stack of its caller for the GPU, which a reading process never uses.
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(clip_seed(self.seed, epoch, clip, "spec augment"))
            keep_frames = TimeMasking(self.augmentation.time_mask)(torch.ones(1, frames))
            keep_mels = FrequencyMasking(self.augmentation.frequency_mask)(torch.ones(mels, 1))
        return keep_frames[0].bool(), keep_mels[:, 0].bool()


def class_balanced_weights(classes: ClassIds) -> np.ndarray:
    """Weight of each clip, the sum over its classes of 1000 / (clips of the class + 0.01), as AST and Audio-MAE draw.

    Args:
        classes: The classes of each clip.

    Returns:
        (clips,) float64.
    """
    rarity = 1000 / (classes.counts() + 0.01)
    return np.array([rarity[classes[clip]].sum() for clip in range(len(classes))])

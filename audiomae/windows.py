"""Audio of any length for models whose input has one length: where it is cut, and which parts are its own."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from audiomae.config import EncoderConfig


@dataclass(frozen=True)
class Windows:
    """Windows that follow each other so that the time steps of their patch grids form one regular sequence.

    The last one is padded. A time step belongs to the audio if at least half of the frames of its patches do; the first
    one does in any case. What follows the last such step, less than half a patch, gets no window of its own. Audio
    shorter than a frame is heard as one, with zeros at its end.

    All numbers but ``steps`` are samples, at the model's rate.

    Attributes:
        sample_rate: The model's, Hz.
        samples: Length of a window.
        hop: From one window to the next. The frames of a window's end overlap those of the next one's start, so this
            is less than ``samples``.
        steps: Time steps of a window.
        step: From one time step to the next.
        patch: Length of a time step, that of all frames in a patch.
        half_patch: Length of half of its frames, rounded up.
        frame: Length of one frame.
    """

    sample_rate: int
    samples: int
    hop: int
    steps: int
    step: int
    patch: int
    half_patch: int
    frame: int

    @classmethod
    def of(cls, config: EncoderConfig) -> Self:
        """Take the windows of a model."""
        front_end, grid = config.front_end(), config.grid
        (frames, _), (patch, _), (stride, _), (steps, _) = (
            grid.spec_size,
            grid.patch_size,
            grid.patch_stride,
            grid.shape,
        )
        step = stride * front_end.hop_size
        return cls(
            sample_rate=config.sample_rate,
            samples=front_end.num_samples(frames),
            hop=steps * step,
            steps=steps,
            step=step,
            patch=front_end.num_samples(patch),
            half_patch=front_end.num_samples((patch + 1) // 2),
            frame=front_end.num_samples(1),
        )

    def num_steps(self, samples: int) -> int:
        """Time steps of audio of so many samples, at least 1."""
        return max(1, (samples - self.half_patch) // self.step + 1)

    def num_windows(self, samples: int) -> int:
        """Windows of audio of so many samples, at least 1."""
        return -(-self.num_steps(samples) // self.steps)

    def times(self, steps: int) -> Tensor:
        """Centre of each of so many time steps, in seconds from the start: ``(steps,)`` float64."""
        return (torch.arange(steps, dtype=torch.float64) * self.step + self.patch / 2) / self.sample_rate

    def cut(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Cut audio into windows.

        Args:
            waveform: ``(B, samples)``.

        Returns:
            The windows ``(B, windows, self.samples)``, zero-padded, a view of one copy of the waveform; and their
            lengths without padding, as :meth:`heard` gives them, ``(windows,)`` int64.
        """
        samples = waveform.shape[1]
        starts = self.hop * torch.arange(self.num_windows(samples))
        padded = F.pad(waveform, (0, int(starts[-1]) + self.samples - samples))
        return padded.unfold(1, self.samples, self.hop), self.heard(samples - starts)

    def heard(self, lengths: Tensor) -> Tensor:
        """Samples that are heard of windows from whose start on the audio has so many: ``(...,)`` int64."""
        return lengths.clamp(self.frame, self.samples)

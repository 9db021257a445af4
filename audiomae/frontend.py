"""Log-mel spectrograms of whole batches: Kaldi's filter-bank features as Audio-MAE uses them, on any device."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREEMPHASIS = 0.97
ENERGY_FLOOR = torch.finfo(torch.float32).eps


class LogMel(nn.Module):
    """Log-mel spectrograms of a batch of waveforms: Kaldi's ``compute-fbank-feats`` after removing each clip's mean.

    Frames lie wholly inside the clip. Each loses its own mean, is pre-emphasised, x[i] - 0.97 x[i-1], and multiplied by
    a symmetric Hann window; triangular filters, equally spaced in mel = 1127 ln(1 + Hz / 700), sum its power spectrum,
    and the logarithm's argument is at least float32's epsilon. This is what `torchaudio.compliance.kaldi.fbank(clip -
    clip.mean(), htk_compat=True, use_energy=False, window_type="hanning", dither=0)` computes, here for a whole batch.

    Rounding grows to 1e-3 and more where a filter holds much less energy than its neighbours. The operations and their
    order are therefore torchaudio's: eagerly on the CPU the spectra are equal to the bit, elsewhere alike in accuracy.

    With ``mean`` and ``std`` the result is (log-mel - mean) / (2 std), as in AST and Audio-MAE; padding is 0 before
    that.

    Args:
        sample_rate: samples a second.
        num_mels: filters. One that is narrower than the spectrum's bins may be empty, as in Kaldi.
        window_ms: length of a frame in milliseconds. The FFT has the next power of two of its samples.
        hop_ms: milliseconds from one frame to the next.
        low_hz: lower edge of the lowest filter.
        high_hz: upper edge of the highest filter; None or 0 is half the sample rate.
        mean: the data set's mean log-mel value.
        std: its standard deviation.

    Raises:
        ValueError: an argument is out of range, or ``mean`` and ``std`` are not given together.
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        num_mels: int = 128,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        low_hz: float = 20.0,
        high_hz: float | None = None,
        mean: float | None = None,
        std: float | None = None,
    ) -> None:
        super().__init__()
        if not sample_rate > 0:
            raise ValueError(f"sample_rate must be positive, got {sample_rate}")
        if num_mels < 3:
            raise ValueError(f"num_mels must be at least 3, got {num_mels}")
        # Kaldi's counts, float rounding included.
        self.window_size = int(sample_rate * window_ms * 0.001)
        self.hop_size = int(sample_rate * hop_ms * 0.001)
        if self.window_size < 2:
            raise ValueError(f"a window needs at least 2 samples, got {window_ms} ms at {sample_rate} Hz")
        if self.hop_size < 1:
            raise ValueError(f"a hop needs at least 1 sample, got {hop_ms} ms at {sample_rate} Hz")
        nyquist = sample_rate / 2
        high_hz = high_hz or nyquist
        if not 0 <= low_hz < high_hz <= nyquist:
            raise ValueError(
                f"filters need 0 <= low_hz < high_hz <= {nyquist:g} (half the sample rate), "
                f"got low_hz={low_hz:g} and high_hz={high_hz:g}"
            )
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std must be given together, got mean={mean} and std={std}")
        if std is not None and not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        self.num_mels, self.sample_rate, self.hop_ms = num_mels, sample_rate, hop_ms
        self.low_hz, self.high_hz = low_hz, high_hz
        self.fft_size = 1 << (self.window_size - 1).bit_length()
        self.mean, self.std = mean, std
        filters = mel_filters(num_mels, self.fft_size, sample_rate, low_hz, high_hz)
        self.bands = _nonzero_bands(filters)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", self._window(torch.float32), persistent=False)

    def denormalize(self, log_mel: Tensor) -> Tensor:
        """Undo the normalisation of spectrograms of any shape; without ``mean`` and ``std`` there is none."""
        return log_mel if self.mean is None or self.std is None else log_mel * (2 * self.std) + self.mean

    @property
    def padding(self) -> float:
        """What frames beyond a clip hold: 0 before the normalisation."""
        return 0.0 if self.mean is None or self.std is None else -self.mean / (2 * self.std)

    def num_frames(self, samples: int) -> int:
        """Frames that a clip of ``samples`` samples gives."""
        return max(0, (samples - self.window_size) // self.hop_size + 1)

    def num_samples(self, frames: int) -> int:
        """The fewest samples that give ``frames`` frames.

        Raises:
            ValueError: ``frames`` is negative.
        """
        if frames < 0:
            raise ValueError(f"frames must not be negative, got {frames}")
        return self.window_size + (frames - 1) * self.hop_size if frames else 0

    def forward(self, waveform: Tensor, target_frames: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Computes (B, 1, T, num_mels) from (B, samples), in the waveform's dtype, whatever autocast says.

        A clip shorter than one window has no frame: it gives padding only.

        Args:
            waveform: (B, samples), float32 or float64.
            target_frames: T, reached by cropping or padding at the end; None is as many as ``samples`` gives.
            lengths: (B,), int32 or int64: each clip's own samples in a batch that is padded on the right, with
                anything. A clip gives what it would give alone, and padding for the rest of its frames. The values
                are checked on the CPU in eager mode only, because elsewhere a check would wait for the device.

        Raises:
            TypeError: ``waveform`` is neither float32 nor float64, or ``lengths`` neither int32 nor int64.
            ValueError: a wrong shape, ``target_frames`` below 1, or a length outside [0, samples].
        """
        self._check(waveform, target_frames, lengths)
        batch, samples = waveform.shape
        frames = self.num_frames(samples)
        if target_frames is None:
            target_frames = frames
        frames = min(frames, target_frames)
        out = waveform.new_empty(batch, 1, target_frames, self.num_mels)
        with torch.autocast(waveform.device.type, enabled=False):
            if waveform.device.type == "cpu" and not torch.compiler.is_compiling():
                # One clip's intermediates nearly fit a core's cache, and the sum for its mean has torchaudio's order.
                for row, length in enumerate([samples] * batch if lengths is None else lengths.tolist()):
                    own_frames = min(frames, self.num_frames(length))
                    if own_frames:
                        clip = waveform[row, :length]
                        clip = (clip - clip.mean())[: self.num_samples(own_frames)]
                        out[row, 0, :own_frames] = self._log_mel(clip)
                    out[row, 0, own_frames:] = self.padding
                return out
            if lengths is not None:
                lengths = lengths.to(waveform.device, non_blocking=True)
            if batch and frames:
                log_mel = self._log_mel(_remove_mean(waveform, lengths)[:, : self.num_samples(frames)])
                if lengths is not None:
                    own = (lengths - self.window_size) // self.hop_size + 1
                    log_mel = log_mel.where(_prefix_mask(own, frames)[:, :, None], self.padding)
                out[:, 0, :frames] = log_mel
            out[:, 0, frames:] = self.padding
            return out

    def _log_mel(self, waveform: Tensor) -> Tensor:
        """(..., samples) without their mean -> (..., T, num_mels), normalised."""
        frame_mean = waveform.unfold(-1, self.window_size, self.hop_size).mean(-1, keepdim=True)
        # A frame starts one sample early, for the pre-emphasis, and reads on to the FFT's size, where the window is 0.
        padded = F.pad(waveform, (1, self.fft_size - self.window_size))
        centred = padded.unfold(-1, self.fft_size + 1, self.hop_size) - frame_mean
        frames = (centred[..., :-1] * -PREEMPHASIS).add_(centred[..., 1:])
        window = self.window if waveform.dtype == torch.float32 else self._window(waveform.dtype, waveform.device)
        spectrum = torch.view_as_real(torch.fft.rfft(frames.mul_(window))).square_()
        power = spectrum[..., 0] + spectrum[..., 1]
        filters = self.filters.to(waveform.dtype)
        energy = torch.cat([power[..., bins] @ filters[bins, mels] for bins, mels in self.bands], dim=-1)
        log_mel = energy.clamp_(min=ENERGY_FLOOR).log_()
        if self.mean is None or self.std is None:
            return log_mel
        return log_mel.sub_(self.mean).div_(2 * self.std)

    def _window(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The symmetric Hann window, then zeros up to the FFT's size. Its first weight is 0 too."""
        window = torch.hann_window(self.window_size, periodic=False, dtype=dtype, device=device)
        return F.pad(window, (0, self.fft_size - self.window_size))

    def _check(self, waveform: Tensor, target_frames: int | None, lengths: Tensor | None) -> None:
        if waveform.dim() != 2:
            raise ValueError(f"waveform must be (batch, samples), got shape {tuple(waveform.shape)}")
        if waveform.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"waveform must be float32 or float64, got {waveform.dtype}")
        if self.window.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"LogMel needs its window in float32, but a cast of the module made it {self.window.dtype}")
        if target_frames is not None and target_frames < 1:
            raise ValueError(f"target_frames must be at least 1, got {target_frames}")
        if lengths is None:
            return
        batch, samples = waveform.shape
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must have shape ({batch},), one for each clip, got {tuple(lengths.shape)}")
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = lengths[(lengths < 0) | (lengths > samples)]
            if len(wrong):
                raise ValueError(f"lengths must be within [0, {samples}], the waveform's samples, got {wrong.tolist()}")


def hz_to_mel(hz: float) -> float:
    """Place of a frequency on Kaldi's mel scale."""
    return 1127.0 * math.log(1.0 + hz / 700.0)


def mel_filters(num_mels: int, fft_size: int, sample_rate: float, low_hz: float, high_hz: float) -> Tensor:
    """Kaldi's triangular mel filters, (fft_size / 2 + 1, num_mels) in float32; the Nyquist bin has no weight.

    They are computed in float32 as in Kaldi and torchaudio, to the bit: in float64 a weight near a filter's corner
    would differ by 1e-3 of itself.
    """
    low, high = hz_to_mel(low_hz), hz_to_mel(high_hz)
    corners = low + torch.arange(num_mels + 2) * ((high - low) / (num_mels + 1))
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    bin_hz = sample_rate / fft_size * torch.arange(fft_size // 2, dtype=torch.float32)
    bin_mel = 1127.0 * (1.0 + bin_hz / 700.0).log()[:, None]
    triangles = torch.minimum((bin_mel - left) / (centre - left), (right - bin_mel) / (right - centre)).clamp(min=0)
    return F.pad(triangles, (0, 0, 0, 1))


def _nonzero_bands(filters: Tensor) -> list[tuple[slice, slice]]:
    """(bins, filters) of each quarter of the filters: products of these blocks leave out most of the zeros."""
    bands = []
    for mels in torch.arange(filters.shape[1]).chunk(4):
        bins = filters[:, mels].any(dim=1).nonzero().flatten().tolist() or [0]
        bands.append((slice(bins[0], bins[-1] + 1), slice(int(mels[0]), int(mels[-1]) + 1)))
    return bands


def _prefix_mask(counts: Tensor, size: int) -> Tensor:
    """(B,) counts -> (B, size), True in the first ``counts[b]`` places of row b."""
    return torch.arange(size, device=counts.device) < counts[:, None]


def _remove_mean(waveform: Tensor, lengths: Tensor | None) -> Tensor:
    """Subtracts each row's mean over its own samples, after putting 0 in place of the others; (B, samples)."""
    # In float64, where there is one, the sum depends neither on the padding nor on the order of its terms.
    wide = waveform.dtype if waveform.device.type == "mps" else torch.float64
    if lengths is None:
        return waveform - waveform.mean(1, keepdim=True, dtype=wide).to(waveform.dtype)
    waveform = waveform.where(_prefix_mask(lengths, waveform.shape[1]), 0)
    mean = waveform.sum(1, keepdim=True, dtype=wide) / lengths[:, None]
    return waveform - mean.to(waveform.dtype)

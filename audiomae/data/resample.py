"""Band-limited resampling of any part of a clip, between any two sample rates.

torchaudio's resampler multiplies each output by a whole period of the rate ratio, most of it zeros: for 44.1 kHz to
16 kHz 475 taps where 35 count, and for two rates without a common divisor a kernel of gigabytes. The taps of
neighbouring outputs lie close together, so here a period's outputs are made in bands, each one matrix product: the same
filter with fewer products. Its tables take less than 1 MB between the usual rates, and more where the period is long:
21 MB from 44,101 Hz to 16 kHz, 113 MB from 999,983 Hz.

A matrix product adds in an order that depends on its number of threads, and a clip must not depend on the process that
reads it. So the products are in float64 with taps in fixed point: of 16- and 24-bit sound every product and every sum
is exact, and order makes no difference.
"""

import math

import torch

_ZERO_CROSSINGS = 6  # of the sinc, on each side
_ROLLOFF = 0.99  # cut-off, relative to the lower Nyquist frequency
_BAND = 128  # input samples between the first and the last output of a band
# Taps are multiples of 2^-28, samples of 2^-23 (2^-24 as the mean of two channels): a sum within +-2 takes 53 bits.
_TAP_SCALE = 2.0**28
_MAX_CACHED_BYTES = 64 << 20


class Resampler:
    """Windowed-sinc interpolation, y[n] = sum_m x[m] h(n / target - m / source), h a sinc in a Hann window.

    The formula is that of Smith, "Digital Audio Resampling" (https://ccrma.stanford.edu/~jos/resample/), with the
    constants that torchaudio takes by default. The clip counts as zero before its first and after its last sample.

    Args:
        source_rate: Sample rate of the input, Hz.
        target_rate: Sample rate of the output, Hz.

    Attributes:
        nbytes: Size of the tables.
    """

    def __init__(self, source_rate: int, target_rate: int):
        divisor = math.gcd(source_rate, target_rate)
        periods = -(-_BAND * divisor // max(source_rate, target_rate))  # one alone may be a thin matrix
        self._source, self._target = source_rate // divisor * periods, target_rate // divisor * periods
        cutoff = min(self._source, self._target) * _ROLLOFF  # twice the cut-off frequency, in cycles a period
        self._margin = math.ceil(_ZERO_CROSSINGS * self._source / cutoff)

        self._bands: list[tuple[int, torch.Tensor]] = []  # (offset of the first tap, filters (taps, outputs))
        outputs = -(-_BAND * self._target // self._source)
        for first in range(0, self._target, outputs):
            last = min(first + outputs, self._target) - 1
            offset, end = first * self._source // self._target, last * self._source // self._target
            at = torch.arange(first, last + 1, dtype=torch.float64)[:, None] / self._target
            taps = torch.arange(offset - self._margin, end + self._margin + 1, dtype=torch.float64) / self._source
            time = (at - taps) * cutoff
            window = torch.cos(time * (math.pi / (2 * _ZERO_CROSSINGS))) ** 2
            filters = torch.sinc(time) * window * (cutoff / self._source)
            filters[time.abs() >= _ZERO_CROSSINGS] = 0
            filters = (filters * _TAP_SCALE).round() / _TAP_SCALE
            self._bands.append((offset, filters.T.contiguous()))
        self.nbytes = sum(filters.nbytes for _, filters in self._bands)

    def length(self, frames: int) -> int:
        """Number of output samples of a clip of ``frames`` input samples."""
        return -(-frames * self._target // self._source)

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Input samples [begin, end) from which output samples [first, first + count) come; may reach past the clip."""
        first_period = first // self._target
        end_period = -(-(first + count) // self._target)
        return first_period * self._source - self._margin, end_period * self._source + self._margin

    def __call__(self, samples: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Output samples [first, first + count), float32, from the input samples that ``span(first, count)`` names."""
        samples = samples.double()
        periods = (samples.numel() - 2 * self._margin) // self._source
        bands = [
            samples[offset:].unfold(0, len(filters), self._source)[:periods] @ filters
            for offset, filters in self._bands
        ]
        skipped = first % self._target
        return torch.cat(bands, dim=1).flatten()[skipped : skipped + count].float()


_CACHE: dict[tuple[int, int], Resampler] = {}  # the one used last comes last


def cached_resampler(source_rate: int, target_rate: int) -> Resampler:
    """The resampler between two rates (Hz), built once as long as it and those used since take no more than 64 MiB."""
    rates = source_rate, target_rate
    resampler = _CACHE.pop(rates, None)
    if resampler is None:
        resampler = Resampler(*rates)
        left = _MAX_CACHED_BYTES - resampler.nbytes
        for others, cached in reversed([*_CACHE.items()]):
            left -= cached.nbytes
            if left < 0:
                _CACHE.pop(others, None)
    _CACHE[rates] = resampler
    return resampler

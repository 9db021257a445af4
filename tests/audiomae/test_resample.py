"""Resamplers that are kept: each rate's once, and not more memory of them than a process can spare."""

import pytest

from audiomae.data import resample
from audiomae.data.resample import Resampler, cached_resampler


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "_CACHE", {})


def kept() -> list[int]:
    return [source for source, _ in resample._CACHE]


def test_usual_rates_are_all_kept() -> None:
    rates = [8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400, 192_000]
    first = [cached_resampler(rate, 16_000) for rate in rates]
    assert [cached_resampler(rate, 16_000) for rate in rates] == first  # the same objects
    assert sum(resampler.nbytes for resampler in first) < 3 << 20


def test_those_that_were_not_used_for_longest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {rate: Resampler(rate, 1_000).nbytes for rate in (1_001, 1_003, 1_007, 1_009)}
    monkeypatch.setattr(resample, "_MAX_CACHED_BYTES", sum(sizes.values()) - min(sizes.values()))
    for rate in (1_001, 1_003, 1_007, 1_001):
        cached_resampler(rate, 1_000)
    assert kept() == [1_003, 1_007, 1_001]
    cached_resampler(1_009, 1_000)
    assert kept() == [1_007, 1_001, 1_009]
    monkeypatch.setattr(resample, "_MAX_CACHED_BYTES", 1)
    large = cached_resampler(1_013, 1_000)
    assert kept() == [1_013]  # what is in use is kept, whatever its size
    assert cached_resampler(1_013, 1_000) is large

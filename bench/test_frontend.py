"""``LogMel`` on a batch against torchaudio clip by clip, in pairs that take turns."""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torchaudio.compliance import kaldi

from audiomae.frontend import LogMel
from bench.pairs import time_pairs
from bench.provenance import provenance

ROUNDS = 15


def torchaudio_log_mel(waveform: Tensor) -> Tensor:
    """(B, samples) at 16 kHz -> (B, 1, frames, 128)."""
    clips = [
        kaldi.fbank(
            clip[None] - clip.mean(), htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128
        )
        for clip in waveform
    ]
    return torch.stack(clips)[:, None]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("seconds", [1, 10])
@pytest.mark.parametrize("batch", [8, 64])
def test_log_mel(benchmark: BenchmarkFixture, batch: int, seconds: int, threads: int) -> None:
    waveform = torch.randn(batch, seconds * 16000, generator=torch.Generator().manual_seed(0)) / 3
    log_mel = LogMel()
    torch.testing.assert_close(log_mel(waveform), torchaudio_log_mel(waveform), rtol=0, atol=5e-6)

    benchmark.group = f"log-mel of {batch} clips of {seconds} s, {threads} threads"
    pairs = time_pairs(
        benchmark, lambda: log_mel(waveform), lambda: torchaudio_log_mel(waveform), rounds=ROUNDS, warmup_rounds=2
    )
    benchmark.extra_info.update(
        {
            "operator": "LogMel",
            "provider": "audiomae",
            "shape": list(waveform.shape),
            "dtype": "float32",
            "baseline": "torchaudio",
            "clips/s": round(batch / benchmark.stats.stats.median, 1),
            **pairs,
            **provenance(torch.device("cpu")),
        }
    )

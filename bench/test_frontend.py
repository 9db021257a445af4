"""``LogMel`` on a batch against torchaudio clip by clip."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchaudio.compliance import kaldi

from audiomae.frontend import LogMel
from bench.compare import Plan, compare
from bench.provenance import provenance
from bench.rows import Row
from bench.turns import Call, Laps, Mark

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = 5e-6
WAVEFORMS = 4


def torchaudio_log_mel(waveform: Tensor) -> Tensor:
    """(B, samples) at 16 kHz -> (B, 1, frames, 128)."""
    clips = [
        kaldi.fbank(
            clip[None] - clip.mean(), htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128
        )
        for clip in waveform
    ]
    return torch.stack(clips)[:, None]


def find_error(actual: Tensor, expected: Tensor) -> str | None:
    """What is wrong with a spectrogram, or None."""
    if actual.shape != expected.shape:
        return f"shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual - expected).abs().max().item()
    return None if error <= TOLERANCE else f"off by {error:.2e}, expected at most {TOLERANCE:.0e}"


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def caller(front_end: Callable[[Tensor], Tensor], waveforms: Sequence[Tensor]) -> Call:
    """Make a call that takes the waveforms of its turn."""

    def call(turn: int, mark: Mark) -> None:
        front_end(waveforms[turn % len(waveforms)])

    return call


@pytest.mark.parametrize(
    ("device", "batch", "seconds", "threads"),
    [
        ("cpu", 8, 1, 1),
        ("cpu", 8, 10, 1),
        ("cpu", 8, 10, 2),
        ("cpu", 64, 10, 1),
        pytest.param("cpu", 64, 10, 2, marks=pytest.mark.full),  # a minute where something else takes a processor
        *[pytest.param("cuda", batch, 10, 1, marks=NEEDS_GPU) for batch in (64, 512)],
    ],
    indirect=["threads"],
)
def test_log_mel(plan: Plan, rows: list[Row], device: str, batch: int, seconds: int, threads: int) -> None:
    if plan.short and device == "cpu" and batch > 8:
        pytest.skip("a second for each round is not --short")
    where = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    waveforms = [torch.randn(batch, seconds * 16000, generator=generator).to(where) / 3 for _ in range(WAVEFORMS)]
    log_mel = LogMel().to(where)
    shape = {"batch": batch, "seconds": seconds} | ({"threads": threads} if device == "cpu" else {})
    about = Row("front end", "log-mel", "LogMel", "torchaudio", shape=shape, about=provenance(where))
    about.wrong = find_error(log_mel(waveforms[0]), torchaudio_log_mel(waveforms[0]))
    if about.wrong:
        rows.append(about)
        pytest.fail(about.wrong)

    forms: dict[str, Callable[[Tensor], Tensor]] = {"torchaudio": torchaudio_log_mel, "LogMel": log_mel}
    calls = {provider: caller(form, waveforms) for provider, form in forms.items()}
    for row in compare(plan, about, calls, Laps(where, kernels=False), budget_s=1.5):
        assert row.p50_ms
        rows.append(replace(row, facts={"clips/s": 1e3 * batch / row.p50_ms}))

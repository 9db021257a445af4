"""``LogMel`` against torchaudio's Kaldi features and against a float64 computation of its own."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchaudio.compliance import kaldi

import audiomae
from audiomae.frontend import LogMel, mel_filters

DEMO_CLIPS = sorted((Path(audiomae.__file__).parent / "data" / "demo").glob("*.flac"))
# torchaudio's float32 spectra are met to the bit; what is left are the power and the product with the filters, some
# 2e-7 of each energy, and the logarithm's last bits, 1e-6 at 16.
SAME_ROUNDING = 5e-6
FLOAT64_ROUNDING = 1e-9


def assert_close(actual: Tensor, expected: Tensor, atol: float, name: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda message: f"{name} {message}")


def torchaudio_log_mel(clip: Tensor, sample_rate: int = 16000, num_mels: int = 128) -> Tensor:
    """(samples,) -> (frames, num_mels), as AST and Audio-MAE call it."""
    return kaldi.fbank(
        clip[None] - clip.mean(),
        htk_compat=True,
        sample_frequency=sample_rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=num_mels,
        dither=0.0,
        frame_shift=10,
    )


def exact_log_mel(clip: Tensor, sample_rate: int = 16000, num_mels: int = 128) -> Tensor:
    """The definition in float64 throughout, filters and window included."""
    x = clip.double().numpy()
    window, hop = int(sample_rate * 25 * 0.001), int(sample_rate * 10 * 0.001)
    fft_size = 2 ** math.ceil(math.log2(window))
    frames = np.lib.stride_tricks.sliding_window_view(x - x.mean(), window)[::hop]
    frames = frames - frames.mean(axis=1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    spectrum = np.fft.rfft(frames * np.hanning(window), fft_size)

    def mel(hz: np.ndarray | float) -> np.ndarray:
        return 1127 * np.log1p(np.asarray(hz) / 700)

    corners = np.linspace(mel(20.0), mel(sample_rate / 2), num_mels + 2)
    bins = mel(np.arange(fft_size // 2 + 1) * sample_rate / fft_size)
    filters = [np.interp(bins, corners[i : i + 3], [0, 1, 0], left=0, right=0) for i in range(num_mels)]
    energy = np.abs(spectrum) ** 2 @ np.stack(filters, axis=1)
    return torch.from_numpy(np.log(np.maximum(energy, np.finfo(np.float32).eps)))


def assert_as_accurate_as_torchaudio(clip: Tensor, name: str, sample_rate: int = 16000, num_mels: int = 128) -> None:
    """Largest error at most twice torchaudio's plus 1e-5, against either float64 computation."""
    ours = LogMel(sample_rate, num_mels)(clip[None])[0, 0]
    theirs = torchaudio_log_mel(clip, sample_rate, num_mels)
    for exact in (
        exact_log_mel(clip, sample_rate, num_mels),
        torchaudio_log_mel(clip.double(), sample_rate, num_mels),
    ):
        assert ours.shape == exact.shape, name
        error, allowed = (ours - exact).abs().max(), 2 * (theirs - exact).abs().max() + 1e-5
        assert error <= allowed, f"{name}: error {error:.2e}, torchaudio's rounding allows {allowed:.2e}"


def pink_noise(samples: int, generator: torch.Generator) -> Tensor:
    spectrum = torch.fft.rfft(torch.randn(samples, generator=generator, dtype=torch.float64))
    noise = torch.fft.irfft(spectrum / torch.arange(len(spectrum)).clamp(min=1).sqrt(), n=samples)
    return noise / noise.abs().max()


def signals(samples: int, sample_rate: int = 16000) -> Iterator[tuple[str, Tensor]]:
    """Named test signals, float32."""
    generator = torch.Generator().manual_seed(samples)
    t = torch.arange(samples, dtype=torch.float64) / sample_rate
    end, nyquist = samples / sample_rate, sample_rate / 2
    rate = math.log(nyquist / 20) / end
    white = torch.randn(samples, generator=generator, dtype=torch.float64)
    shapes = {
        "linear sweep": torch.sin(math.pi * nyquist / end * t**2),
        "log sweep": torch.sin(2 * math.pi * 20 / rate * ((rate * t).exp() - 1)),
        "tone": torch.sin(2 * math.pi * 1000 * t),
        "rumble": torch.sin(2 * math.pi * 1.2 * t),
        "white noise": white / 3,
        "pink noise": pink_noise(samples, generator),
    }
    for level in (1.0, 1e-1, 1e-3, 32768.0):
        yield from ((f"{name} at {level}", (level * signal).float()) for name, signal in shapes.items())
    for offset in (-0.9, 0.01, 0.5, 10.0, 1000.0):
        yield f"noise on a constant {offset}", (offset + 1e-3 * white).float()
    yield "noise on a step", (torch.where(t < end / 2, 0.5, -0.5) + 1e-3 * white).float()
    yield "silence of one bit", torch.randint(-1, 2, (samples,), generator=generator) / 32768
    for constant in (0.0, 0.1, 1.0):
        yield f"constant {constant}", torch.full((samples,), constant)
    for place in (0, 1, samples // 2, samples - 1):
        yield f"click at {place}", torch.eye(samples)[place] if samples < 2000 else (t == t[place]).float()


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 997, 7919, 16000, 48611])
def test_accuracy_on_signals(samples: int) -> None:
    for name, clip in signals(samples):
        assert_as_accurate_as_torchaudio(clip, name)


def test_accuracy_on_recordings() -> None:
    assert len(DEMO_CLIPS) > 100
    for path in DEMO_CLIPS:
        clip = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        if len(clip) >= 400:
            assert_as_accurate_as_torchaudio(clip, path.name)


@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("num_mels", [40, 64, 80, 128])
def test_other_rates_and_filters(sample_rate: int, num_mels: int) -> None:
    samples = int(0.3 * sample_rate) + 17
    log_mel = LogMel(sample_rate, num_mels)
    for name, clip in signals(samples, sample_rate):
        expected = torchaudio_log_mel(clip, sample_rate, num_mels)
        assert_close(log_mel(clip[None])[0, 0], expected, SAME_ROUNDING, name)
    noise = dict(signals(samples, sample_rate))["pink noise at 1.0"]
    assert_as_accurate_as_torchaudio(noise, "pink noise", sample_rate, num_mels)


@pytest.mark.parametrize(("low_hz", "high_hz"), [(20.0, None), (20.0, 0.0), (0.0, 5000.0), (125.0, 7600.0)])
@pytest.mark.parametrize("num_mels", [4, 23, 128, 300])
def test_filters_equal_torchaudio(num_mels: int, low_hz: float, high_hz: float | None) -> None:
    bins, _ = kaldi.get_mel_banks(num_mels, 512, 16000.0, low_hz, high_hz or 0.0, 100.0, -500.0, 1.0)
    filters = LogMel(num_mels=num_mels, low_hz=low_hz, high_hz=high_hz).filters
    assert_close(filters, torch.nn.functional.pad(bins, (0, 1)).T, 0)
    assert_close(filters, mel_filters(num_mels, 512, 16000, low_hz, high_hz or 8000), 0)


def test_other_windows_and_hops() -> None:
    clip = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for window_ms, hop_ms in ((32.0, 10.0), (25.0, 7.3), (10.0, 20.0), (0.125, 1.0), (0.2, 0.0625)):
        expected = kaldi.fbank(
            clip[None] - clip.mean(),
            frame_length=window_ms,
            frame_shift=hop_ms,
            window_type="hanning",
            num_mel_bins=20,
        )
        actual = LogMel(num_mels=20, window_ms=window_ms, hop_ms=hop_ms)(clip[None])[0, 0]
        assert_close(actual, expected, SAME_ROUNDING)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(0, 4),
    samples=st.integers(0, 4000),
    target_frames=st.none() | st.integers(1, 40),
    scale=st.sampled_from([1e-4, 0.1, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 0.3, -5.0]),
    normalised=st.booleans(),
    with_lengths=st.booleans(),
)
def test_batch_equals_torchaudio_clip_by_clip(
    seed: int,
    batch: int,
    samples: int,
    target_frames: int | None,
    scale: float,
    offset: float,
    normalised: bool,
    with_lengths: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    waveform = scale * (torch.randn(batch, samples, generator=generator) + offset)
    lengths = torch.randint(0, samples + 1, (batch,), generator=generator) if with_lengths else None
    mean, std = (-4.25, 4.5) if normalised else (None, None)
    log_mel = LogMel(mean=mean, std=std)

    frames = log_mel.num_frames(samples) if target_frames is None else target_frames
    expected = torch.zeros(batch, 1, frames, 128)
    for row, length in enumerate([samples] * batch if lengths is None else lengths.tolist()):
        if length >= 400:
            clip = torchaudio_log_mel(waveform[row, :length])[:frames]
            expected[row, 0, : len(clip)] = clip
    if normalised:
        expected = (expected + 4.25) / 9.0
    assert_close(log_mel(waveform, target_frames, lengths), expected, SAME_ROUNDING)


# The path of a device other than the CPU is taken by compiled code too, so "eager" runs it operation by operation.
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("target_frames", [None, 3, 150])
def test_lengths_equal_each_clip_alone(backend: str | None, target_frames: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([16001, 0, 399, 400, 7919, 559, 560])
    waveform = torch.randn(len(lengths), 16001, generator=generator, dtype=torch.float64) + 0.5
    waveform[torch.arange(16001) >= lengths[:, None]] = torch.nan
    log_mel = LogMel(mean=-4.0, std=4.5)
    alone = [log_mel(clip[None, :length]) for clip, length in zip(waveform, lengths.tolist(), strict=True)]

    batched = torch.compile(log_mel, fullgraph=True, backend=backend) if backend else log_mel
    actual = batched(waveform, target_frames, lengths)
    torch._dynamo.reset()
    frames = target_frames or log_mel.num_frames(16001)
    assert actual.shape == (len(lengths), 1, frames, 128)
    expected = torch.full_like(actual, 4.0 / 9.0)
    for row, clip in enumerate(alone):
        expected[row, :, : clip.shape[2]] = clip[0, :, :frames]
    assert_close(actual, expected, FLOAT64_ROUNDING)


@pytest.mark.parametrize(("backend", "atol"), [(None, 0), ("eager", SAME_ROUNDING)])
def test_lengths_round_as_each_clip_alone(backend: str | None, atol: float) -> None:
    waveform = torch.randn(4, 9001, generator=torch.Generator().manual_seed(0)) + 0.1
    lengths = torch.tensor([9001, 1234, 5000, 8999], dtype=torch.int32)
    log_mel = torch.compile(LogMel(), fullgraph=True, backend=backend) if backend else LogMel()
    batched = log_mel(waveform, 100, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert_close(batched[row], log_mel(waveform[row, None, :length], 100)[0], atol)
    torch._dynamo.reset()


def test_batched_path_is_as_accurate_as_torchaudio() -> None:
    waveform = torch.randn(32, 16000, generator=torch.Generator().manual_seed(0)) / 3 + 0.01
    exact = torch.stack([exact_log_mel(clip) for clip in waveform])
    theirs = torch.stack([torchaudio_log_mel(clip) for clip in waveform])
    ours = torch.compile(LogMel(), fullgraph=True, backend="eager")(waveform)[:, 0]
    torch._dynamo.reset()
    # Its roundings are its own, so that single errors differ: where a filter is nearly empty they have no bound.
    error, allowed = (ours - exact).square().mean().sqrt(), 1.2 * (theirs - exact).square().mean().sqrt()
    assert error <= allowed, f"RMS error {error:.2e}, 1.2 times torchaudio's is {allowed:.2e}"


def test_inductor_compiles_without_a_graph_break() -> None:
    log_mel = LogMel(sample_rate=8000, num_mels=40)
    waveform = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compiled = torch.compile(log_mel, fullgraph=True)(waveform, 16)
    torch._dynamo.reset()
    assert_close(compiled, log_mel(waveform, 16), FLOAT64_ROUNDING)


def test_float64_computes_in_float64() -> None:
    log_mel = LogMel()
    for name, clip in signals(7919):
        actual = log_mel(clip.double()[None])
        assert actual.dtype == torch.float64
        expected = torchaudio_log_mel(clip.double())
        assert_close(actual[0, 0], expected, FLOAT64_ROUNDING, name)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_gradient(backend: str | None) -> None:
    log_mel = LogMel(sample_rate=1000, num_mels=5, mean=1.0, std=2.0)
    waveform = torch.randn(3, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lengths = torch.tensor([70, 40, 0])
    function = torch.compile(log_mel, fullgraph=True, backend=backend) if backend else log_mel
    assert torch.autograd.gradcheck(lambda x: function(x, 6, lengths), waveform)
    torch._dynamo.reset()


def test_autocast_changes_nothing() -> None:
    waveform = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    log_mel = LogMel(mean=-4.0, std=4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = log_mel(waveform)
    assert_close(actual, log_mel(waveform), 0)


def test_strided_waveform() -> None:
    waveform = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    log_mel = LogMel()
    assert_close(log_mel(waveform), log_mel(waveform.contiguous()), FLOAT64_ROUNDING)


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_clip_shorter_than_a_window_gives_padding(samples: int) -> None:
    waveform = torch.ones(2, samples)
    assert LogMel()(waveform).shape == (2, 1, 0, 128)
    assert_close(LogMel()(waveform, 5), torch.zeros(2, 1, 5, 128), 0)
    padding = LogMel(mean=-4.0, std=2.0)(waveform, 5, torch.full((2,), samples))
    assert_close(padding, torch.ones(2, 1, 5, 128), 0)


@given(frames=st.integers(1, 2000), extra=st.integers(0, 159))
def test_num_samples_is_the_fewest(frames: int, extra: int) -> None:
    log_mel = LogMel()
    samples = log_mel.num_samples(frames)
    assert log_mel.num_frames(samples - 1) == frames - 1
    assert log_mel.num_frames(samples + extra) == frames


def test_no_frames_need_no_samples() -> None:
    assert LogMel().num_samples(0) == 0
    assert LogMel().num_frames(0) == 0
    with pytest.raises(ValueError, match="frames must not be negative, got -1"):
        LogMel().num_samples(-1)


def test_state_dict_is_empty() -> None:
    log_mel = LogMel(mean=0.0, std=1.0)
    assert not log_mel.state_dict()
    assert not list(log_mel.parameters())
    log_mel.load_state_dict({})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_rate": 0}, "sample_rate must be positive, got 0"),
        ({"sample_rate": -16000}, "sample_rate must be positive, got -16000"),
        ({"num_mels": 2}, "num_mels must be at least 3, got 2"),
        ({"window_ms": 0.1}, "a window needs at least 2 samples, got 0.1 ms at 16000 Hz"),
        ({"window_ms": -25.0}, "a window needs at least 2 samples, got -25.0 ms"),
        ({"hop_ms": 0.06}, "a hop needs at least 1 sample, got 0.06 ms at 16000 Hz"),
        ({"high_hz": 8001.0}, "<= 8000 .* got low_hz=20 and high_hz=8001"),
        ({"high_hz": 20.0}, "low_hz < high_hz"),
        ({"high_hz": -500.0}, "high_hz=-500"),
        ({"low_hz": -1.0}, "0 <= low_hz"),
        ({"low_hz": math.nan}, "0 <= low_hz"),
        ({"mean": -4.0}, "mean and std must be given together, got mean=-4.0 and std=None"),
        ({"std": 4.0}, "mean and std must be given together"),
        ({"mean": 0.0, "std": 0.0}, "std must be positive, got 0.0"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel(**arguments)


@pytest.mark.parametrize(
    ("waveform", "target_frames", "lengths", "error", "message"),
    [
        (torch.zeros(1000), None, None, ValueError, r"\(batch, samples\), got shape \(1000,\)"),
        (torch.zeros(2, 1, 1000), None, None, ValueError, r"\(batch, samples\), got shape \(2, 1, 1000\)"),
        (torch.zeros(2, 1000).bfloat16(), None, None, TypeError, "float32 or float64, got torch.bfloat16"),
        (torch.zeros(2, 1000).half(), None, None, TypeError, "float32 or float64, got torch.float16"),
        (torch.zeros(2, 1000, dtype=torch.int16), None, None, TypeError, "float32 or float64, got torch.int16"),
        (torch.zeros(2, 1000), 0, None, ValueError, "target_frames must be at least 1, got 0"),
        (torch.zeros(2, 1000), None, torch.tensor([5]), ValueError, r"shape \(2,\), one for each clip, got \(1,\)"),
        (torch.zeros(2, 1000), None, torch.tensor(5), ValueError, r"shape \(2,\), one for each clip, got \(\)"),
        (torch.zeros(2, 1000), None, torch.tensor([5.0, 6.0]), TypeError, "int32 or int64, got torch.float32"),
        (torch.zeros(2, 1000), None, torch.tensor([5, 1001]), ValueError, r"within \[0, 1000\].* got \[1001\]"),
        (torch.zeros(2, 1000), None, torch.tensor([-1, 7]), ValueError, r"within \[0, 1000\].* got \[-1\]"),
    ],
)
def test_input_errors(
    waveform: Tensor, target_frames: int | None, lengths: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LogMel()(waveform, target_frames, lengths)


def test_a_module_cast_to_low_precision_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a cast of the module made it torch\.bfloat16"):
        LogMel().bfloat16()(torch.zeros(1, 1000))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu_without_waiting() -> None:
    generator = torch.Generator().manual_seed(0)
    waveform = torch.randn(5, 16001, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([16001, 399, 400, 7919, 0])
    log_mel = LogMel(mean=-4.0, std=4.5)
    expected = log_mel(waveform, 120, lengths)
    log_mel, waveform, gpu_lengths = log_mel.cuda(), waveform.cuda(), lengths.cuda()
    log_mel(waveform, 120, gpu_lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [log_mel(waveform, 120, gpu_lengths), log_mel(waveform, 120, lengths)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for actual in results:
        assert_close(actual.cpu(), expected, FLOAT64_ROUNDING)

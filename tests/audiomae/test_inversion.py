"""Sound from log-mel spectrograms: pitch, level, place in time, and the spectrograms of what comes back."""

import math

import pytest
import torch
from torch import Tensor
from torchaudio.transforms import InverseMelScale

from audiomae.data import read_manifest, read_waveform
from audiomae.frontend import LogMel
from audiomae.inversion import SILENCE, _invert_filters, invert_log_mel

FRONT_END = LogMel()
FRONT_ENDS = {
    "default": FRONT_END,
    "odd window of 551 samples": LogMel(22050, 80),
    "window of four hops": LogMel(8000, 40, window_ms=32.0, hop_ms=8.0, low_hz=0.0),
}


def there_and_back(waveform: Tensor, front_end: LogMel = FRONT_END, **settings: int) -> Tensor:
    return invert_log_mel(front_end(waveform[None])[:, 0], front_end, **settings)[0]


def demo_clips() -> dict[str, Tensor]:
    """Every ninth demo clip of at least 8 frames, up to 2 s of each."""
    manifest = read_manifest()
    paths = [manifest.path(clip) for clip in range(0, len(manifest), 9)]
    clips = {path: read_waveform(path, 16000, duration=2.0) for path in paths}
    return {path: clip for path, clip in clips.items() if len(clip) >= FRONT_END.num_samples(8)}


def rms(frames: Tensor) -> Tensor:
    return frames.square().mean(-1).sqrt()


@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS)
@pytest.mark.parametrize("hz", [110.0, 440.0, 1000.0, 3100.0])
def test_tones_come_back_at_their_pitch_and_level(front_end: LogMel, hz: float) -> None:
    rate = front_end.sample_rate
    tone = 0.5 * torch.sin(2 * math.pi * hz * torch.arange(rate) / rate)
    back = there_and_back(tone, front_end)
    assert back.shape == (front_end.num_samples(front_end.num_frames(rate)),)
    spectrum = torch.fft.rfft(back * torch.hann_window(len(back)), n=4 * rate).abs()
    # A mel filter is all that is known of the place; at 3.1 kHz they are 70 Hz apart, or 200 where there are but 40.
    assert abs(spectrum.argmax().item() / 4 - hz) < max(6.0, 0.03 * hz)
    assert 0.9 < rms(back) / rms(tone) < 1.1


@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_clicks_come_back_where_they_were(front_end: LogMel) -> None:
    rate, hop = front_end.sample_rate, front_end.hop_size
    # Every place between two frames; the first and last are as close to an end as frames can tell.
    places = [front_end.window_size // 2, *(rate // 10 * i + hop * i // 12 for i in range(1, 12))]
    clicks = torch.zeros(rate * 5 // 4)
    clicks[places] = 0.8
    back = there_and_back(clicks, front_end)
    errors = []
    for place in places:  # a click comes back as a short burst: its energy's centre counts
        begin = max(place - rate // 25, 0)
        energy = back[begin : place + rate // 25].square()
        errors.append((energy @ torch.arange(len(energy)).float() / energy.sum()).item() + begin - place)
    assert max(map(abs, errors)) < hop, errors
    assert abs(sum(errors) / len(errors)) < hop / 8, errors  # 0.07 hops with any seed


def test_demo_clips_come_back_alike() -> None:
    """Spectral convergence is |A - B| / |A| of the magnitudes in the mel filters; with four seeds 0.05, at worst 0.09.

    Torchaudio's InverseMelScale instead of our updates gives 0.09, at worst 0.4; half a hop's shift 0.3; 8 iterations
    0.11. Envelopes correlate by 0.975, at worst 0.8 for a deep bass; with half a hop's shift by 0.95.
    """
    convergences, envelopes = {}, {}
    for path, clip in demo_clips().items():
        log_mel = FRONT_END(clip[None])[0, 0]
        back = there_and_back(clip)
        magnitude, magnitude_back = log_mel.div(2).exp(), FRONT_END(back[None])[0, 0].div(2).exp()
        convergences[path] = ((magnitude - magnitude_back).norm() / magnitude.norm()).item()
        centred = clip[: len(back)] - clip.mean()
        levels = torch.stack([rms(x.unfold(0, 400, 160)) for x in (centred, back)])
        envelopes[path] = torch.corrcoef(levels)[0, 1].item()
    assert len(convergences) >= 10
    assert max(convergences.values()) < 0.15, convergences
    assert sum(convergences.values()) / len(convergences) < 0.06, convergences
    assert min(envelopes.values()) > 0.7, envelopes
    assert sum(envelopes.values()) / len(envelopes) > 0.96, envelopes


def test_more_iterations_come_closer() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(8000, generator=generator)
    log_mel = FRONT_END(noise[None])
    distances = [
        (FRONT_END(there_and_back(noise, iterations=iterations)[None]) - log_mel).abs().mean()
        for iterations in (1, 8, 64)
    ]
    assert distances[0] > 1.2 * distances[1] > 1.4 * distances[2], distances


@pytest.mark.parametrize("value", [SILENCE, SILENCE + 1e-5, -20.0, -math.inf])
def test_the_floor_and_below_is_silence(value: float) -> None:
    back = invert_log_mel(torch.full((1, 5, 128), value), FRONT_END)
    torch.testing.assert_close(back, torch.zeros(1, FRONT_END.num_samples(5)), rtol=0, atol=0)


def test_digital_silence_survives_the_normalisation() -> None:
    front_end = LogMel(mean=-4.2677393, std=4.5689974)
    clip = torch.zeros(1, 4000)
    clip[:, 2000:] = 0.5 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    back = invert_log_mel(front_end.denormalize(front_end(clip)[:, 0]), front_end)
    assert back[:, :1500].abs().max() < 1e-3  # its mean is removed with the clip's
    assert back[:, 2400:].abs().max() > 0.5
    quiet = invert_log_mel(front_end.denormalize(front_end(torch.zeros(1, 4000))[:, 0]), front_end)
    assert quiet.count_nonzero() == 0


def test_seed_alone_decides() -> None:
    clips = 0.1 * torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    log_mel = FRONT_END(clips)[:, 0].double().requires_grad_()
    state = torch.random.get_rng_state()
    batch = invert_log_mel(log_mel, FRONT_END, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert batch.dtype == torch.float32
    assert not batch.requires_grad
    torch.rand(5)
    torch.testing.assert_close(invert_log_mel(log_mel[1:2], FRONT_END, seed=3)[0], batch[1], rtol=0, atol=0)
    other = invert_log_mel(log_mel, FRONT_END, seed=4)
    assert (other - batch).abs().max() > 0.01


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_few_frames(frames: int) -> None:
    clip = 0.1 * torch.randn(FRONT_END.num_samples(frames), generator=torch.Generator().manual_seed(0))
    back = there_and_back(clip)
    assert back.shape == clip.shape
    assert 0.5 < rms(back) / rms(clip) < 2


def test_any_value_in_an_empty_filter_does_no_harm() -> None:
    log_mel = torch.full((1, 8, 128), 2.0)
    back = invert_log_mel(log_mel, FRONT_END)
    assert (~FRONT_END.filters.any(0)).sum() == 1
    log_mel[..., ~FRONT_END.filters.any(0)] = SILENCE
    torch.testing.assert_close(back, invert_log_mel(log_mel, FRONT_END), rtol=0, atol=0)
    assert 0.1 < rms(back) < 100


def test_no_clips() -> None:
    assert invert_log_mel(torch.zeros(0, 4, 128), FRONT_END).shape == (0, FRONT_END.num_samples(4))


@pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
def test_power_spectra_have_the_energies_of_the_filters() -> None:
    clip = next(iter(demo_clips().values()))
    energy = FRONT_END(clip[None])[0, 0].exp()
    power = _invert_filters(energy, FRONT_END.filters)
    assert power.min() >= 0
    blind = ~FRONT_END.filters.any(1)
    assert blind.sum() == 2  # offset and Nyquist frequency
    assert power[:, blind].count_nonzero() == 0
    used = FRONT_END.filters.any(0)
    assert not used.all()  # an empty one must do no harm

    def error(power: Tensor) -> Tensor:
        return ((power @ FRONT_END.filters)[:, used].clamp(min=1e-9).log() - energy[:, used].log()).abs().mean()

    inverse = InverseMelScale(257, driver="gelsd")
    inverse.fb = FRONT_END.filters
    assert error(power) < 0.1
    assert error(power) < error(inverse(energy.T.contiguous()).T)


@pytest.mark.parametrize(
    ("log_mel", "settings", "message"),
    [
        (torch.zeros(5, 128), {}, r"log_mel has shape \(5, 128\), expected \(B, at least 1 frame, 128 mel bins\)"),
        (torch.zeros(1, 1, 5, 128), {}, r"log_mel has shape \(1, 1, 5, 128\), expected"),
        (torch.zeros(1, 0, 128), {}, r"log_mel has shape \(1, 0, 128\), expected"),
        (torch.zeros(1, 5, 64), {}, r"log_mel has shape \(1, 5, 64\), expected"),
        (torch.zeros(1, 5, 128), {"iterations": 0}, "iterations is 0, expected at least 1"),
        (torch.full((1, 5, 128), math.nan), {}, "log_mel reaches from nan to nan, expected values of finite energy"),
        (torch.full((1, 5, 128), math.inf), {}, "log_mel reaches from inf to inf, expected values of finite energy"),
        (torch.full((1, 5, 128), 90.0), {}, "log_mel reaches from 90.0 to 90.0, expected values of finite energy"),
    ],
)
def test_bad_input_is_told(log_mel: Tensor, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        invert_log_mel(log_mel, FRONT_END, **settings)


def test_frames_that_hardly_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="hop is 240 samples, expected at most half of the window's 400"):
        invert_log_mel(torch.zeros(1, 5, 128), LogMel(hop_ms=15.0))

import numpy as np
import pytest
import soundfile as sf
import torch
import torchaudio
from torch.utils.data import DataLoader

from audiomae.data import ClipBatches, ClipDataset, read_manifest, read_waveform

from .sounds import crop_start, dataset_of, needs, noise, write

RATES = (8_000, 11_025, 11_127, 22_050, 32_000, 44_100, 48_000, 96_001, 192_000)


# Reading


@pytest.mark.parametrize(
    ("name", "kwargs", "step"),
    [
        ("pcm16.wav", {"subtype": "PCM_16"}, 2**-15),
        ("pcm24.wav", {"subtype": "PCM_24"}, 2**-23),
        ("float.wav", {"subtype": "FLOAT"}, 0),
        ("double.w64", {"subtype": "DOUBLE"}, 0),
        ("pcm16.flac", {"subtype": "PCM_16"}, 2**-15),
        ("pcm24.flac", {"subtype": "PCM_24"}, 2**-23),
        ("big-endian.aiff", {"subtype": "PCM_16"}, 2**-15),
        ("sun.au", {"subtype": "PCM_16"}, 2**-15),
    ],
)
def test_lossless_formats(tmp_path, name, kwargs, step):
    samples = noise(5_001)[:, 0]
    waveform = read_waveform(write(tmp_path / name, samples, **kwargs), 16_000)
    torch.testing.assert_close(waveform, torch.from_numpy(samples), rtol=0, atol=step)


@pytest.mark.parametrize(
    ("name", "kwargs", "tolerance"),
    [
        pytest.param("vorbis.ogg", {"format": "OGG", "subtype": "VORBIS"}, 1e-6, marks=needs("OGG")),
        pytest.param(
            "opus.opus", {"format": "OGG", "subtype": "OPUS"}, 0.02, marks=needs("OGG")
        ),  # its decoder has to settle
        pytest.param("variable.mp3", {"format": "MP3", "bitrate_mode": "VARIABLE"}, 1e-6, marks=needs("MP3")),
        pytest.param(
            "few-bits.mp3",
            {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.99},
            1e-6,
            marks=needs("MP3"),
            id="mp3-whose-frames-take-bits-from-earlier-ones",
        ),
        pytest.param("unseekable.wav", {"subtype": "GSM610"}, 1e-6, id="encoding-that-cannot-be-sought"),
    ],
)
def test_part_of_a_lossy_file_equals_that_part_of_the_whole(tmp_path, name, kwargs, tolerance):
    time = np.arange(16_000 * 8) / 16_000
    tone = (0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * noise(time.size)[:, 0]).astype(np.float32)
    path = write(tmp_path / name, tone, **kwargs)
    whole, _ = sf.read(path, dtype="float32")
    for start in np.random.default_rng(1).uniform(0, 5, 12):
        first = round(start * 16_000)
        part = read_waveform(path, 16_000, start, duration=0.5)
        torch.testing.assert_close(part, torch.from_numpy(whole[first : first + 8_000]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels_are_averaged(tmp_path, channels):
    samples = noise(1_000, channels)
    waveform = read_waveform(write(tmp_path / "a.wav", samples, subtype="FLOAT"), 16_000)
    torch.testing.assert_close(
        waveform, torch.from_numpy(samples.mean(axis=1, dtype=np.float64)), rtol=0, atol=1e-7, check_dtype=False
    )


@pytest.mark.parametrize("rate", RATES)
def test_any_part_of_a_resampled_clip_equals_that_part_of_the_whole(tmp_path, rate):
    path = write(tmp_path / "a.wav", noise(rate * 3 + 1, channels=2), rate, subtype="FLOAT")
    whole = read_waveform(path, 16_000)
    assert whole.shape == (-(-(rate * 3 + 1) * 16_000 // rate),)
    rng = np.random.default_rng(rate)
    for first, count in [(0, 1), (0, 9_000), (whole.numel() - 1, 1), *rng.integers(1, 30_000, (6, 2))]:
        part = read_waveform(path, 16_000, start=first / 16_000, duration=count / 16_000)
        torch.testing.assert_close(part, whole[first : first + count], rtol=0, atol=1e-6)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("rate", RATES)
def test_a_resampled_clip_depends_neither_on_threads_nor_on_where_it_is_cut(tmp_path, rate, subtype):
    path = write(tmp_path / "a.wav", noise(rate * 2 + 1, channels=2), rate, subtype=subtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = read_waveform(path, 16_000)
        for more in (3, 8):
            torch.set_num_threads(more)
            torch.testing.assert_close(read_waveform(path, 16_000), whole, rtol=0, atol=0)
            part = read_waveform(path, 16_000, start=0.5, duration=1.25)
            torch.testing.assert_close(part, whole[8_000:28_000], rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rate", sorted(set(RATES) - {11_127, 96_001}))  # where torchaudio's kernel is of sane size
def test_resampling_equals_torchaudio(tmp_path, rate):
    samples = noise(rate // 2 + 3)[:, 0]
    waveform = read_waveform(write(tmp_path / "a.wav", samples, rate, subtype="FLOAT"), 16_000)
    resample = torchaudio.transforms.Resample(rate, 16_000, dtype=torch.float64)
    expected = resample(torch.from_numpy(samples).double()).float()
    torch.testing.assert_close(waveform, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("target", [16_000, 44_100])
def test_a_tone_keeps_its_pitch_and_phase(tmp_path, rate, target):
    path = write(tmp_path / "a.wav", np.sin(2 * np.pi * 440 * np.arange(rate) / rate), rate, subtype="FLOAT")
    waveform = read_waveform(path, target)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(target, dtype=torch.float64) / target).float()
    inner = slice(target // 50, -target // 50)  # the clip's edges see silence
    torch.testing.assert_close(waveform[inner], expected[inner], rtol=0, atol=3e-3)


@pytest.mark.parametrize("rate", [1, 8_000, 16_000, 44_100, 192_000])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_clips_of_a_few_samples(tmp_path, rate, length):
    path = write(tmp_path / "a.wav", noise(length), rate, subtype="FLOAT")
    whole = read_waveform(path, 16_000)
    assert whole.shape == (-(-length * 16_000 // rate),)
    waveform, _ = dataset_of(path, samples=500, gain_db=0.0)[0, 0]
    start = crop_start(0, 0, 0, whole.numel())
    torch.testing.assert_close(waveform, whole[(start + torch.arange(500)) % whole.numel()], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        *({"start": start} for start in (-0.1, 1.0, float("inf"), -float("inf"), 1e308)),
        *({"duration": duration} for duration in (0.0, -1.0, -float("inf"))),
    ],
)
def test_a_part_outside_the_clip(tmp_path, settings):
    path = write(tmp_path / "a.wav", noise(16_000))
    with pytest.raises(ValueError, match=r"start of .* s lies outside|duration must be"):
        read_waveform(path, 16_000, **settings)


def test_the_end_of_a_clip_ends_a_part(tmp_path):
    path = write(tmp_path / "a.wav", noise(16_000))
    for duration in (10.0, float("inf")):
        assert read_waveform(path, 16_000, start=0.75, duration=duration).shape == (4_000,)


# Crops and gain


@pytest.mark.parametrize("length", [1, 3, 100, 999, 1_000, 1_001, 1_499, 5_000])
def test_crops_go_round_the_clip(tmp_path, length):
    samples = np.arange(1, length + 1, dtype=np.float32)
    dataset = dataset_of(write(tmp_path / "ramp.wav", samples, subtype="FLOAT"), samples=1_000, gain_db=0.0)
    starts = set()
    for epoch in range(20):
        waveform, _ = dataset[epoch, 0]
        start = int(waveform[0]) - 1
        starts.add(start)
        expected = torch.from_numpy(samples[(start + np.arange(1_000)) % length])
        torch.testing.assert_close(waveform, expected, rtol=0, atol=0)
    assert len(starts) > min(length, 20) // 2


@pytest.mark.parametrize("rate", [8_000, 44_100, 11_127])
@pytest.mark.parametrize("seconds", [0.31, 2.0])
def test_crops_of_resampled_clips_go_round_the_resampled_clip(tmp_path, rate, seconds):
    path = write(tmp_path / "a.wav", noise(round(rate * seconds)), rate, subtype="FLOAT")
    whole = read_waveform(path, 16_000)
    dataset = dataset_of(path, samples=16_000, gain_db=0.0, seed=3)
    for epoch in range(8):
        start = crop_start(3, epoch, 0, whole.numel())
        expected = whole[(start + torch.arange(16_000)) % whole.numel()]
        torch.testing.assert_close(dataset[epoch, 0][0], expected, rtol=0, atol=1e-6)


def test_crops_start_anywhere_alike(tmp_path):
    path = write(tmp_path / "ramp.wav", np.arange(32, dtype=np.float32), subtype="FLOAT")
    dataset = dataset_of(path, samples=1, gain_db=0.0)
    counts = np.bincount([int(dataset[epoch, 0][0]) for epoch in range(3_200)], minlength=32)
    assert ((counts - 100) ** 2 / 100).sum() < 61.1  # chi-squared of 31 degrees of freedom, 1 in 1,000


def test_crop_at_the_start(tmp_path):
    samples = noise(3_000)[:, 0]
    dataset = dataset_of(write(tmp_path / "a.wav", samples, subtype="FLOAT"), samples=2_000, gain_db=0.0, crop="start")
    for epoch in range(3):
        torch.testing.assert_close(dataset[epoch, 0][0], torch.from_numpy(samples[:2_000]), rtol=0, atol=0)


def test_gain_is_uniform_in_decibels_and_clips_nothing(tmp_path):
    path = write(tmp_path / "loud.wav", np.tile([0.9, -0.9], 5).astype(np.float32), subtype="FLOAT")
    dataset = dataset_of(path, samples=4, gain_db=6.0)
    gains = np.array([20 * np.log10(float(dataset[epoch, 0][0].max()) / 0.9) for epoch in range(2_000)])
    assert -6.0001 < gains.min() < -5.9
    assert 5.9 < gains.max() < 6.0001
    counts, _ = np.histogram(gains, bins=20, range=(-6, 6))
    assert ((counts - 100) ** 2 / 100).sum() < 43.8  # chi-squared of 19 degrees of freedom, 1 in 1,000


def test_a_draw_depends_on_seed_epoch_and_clip(tmp_path):
    path = write(tmp_path / "a.wav", noise(20_000))
    dataset = dataset_of(path, path, samples=100, seed=1)
    first, pair = dataset[4, 1]
    torch.testing.assert_close(dataset[4, 1][0], first, rtol=0, atol=0)
    assert pair.dtype == torch.int64
    assert pair.tolist() == [4, 1]
    others = [dataset[4, 0], dataset[5, 1], dataset_of(path, path, samples=100, seed=2)[4, 1]]
    assert not any(torch.equal(first, other) for other, _ in others)


def test_workers_do_not_change_the_batches():
    manifest = read_manifest()
    dataset = ClipDataset(manifest, sample_rate=22_050, samples=22_050, seed=5)
    batches = ClipBatches(len(manifest), batch_size=40, seed=5)

    def epochs(**kwargs):
        loader = DataLoader(dataset, batch_sampler=batches, **kwargs)
        for epoch in range(2):
            batches.set_epoch(epoch)
            yield from loader

    for (waveform, pairs), (expected, expected_pairs) in zip(
        epochs(num_workers=2, persistent_workers=True), epochs(num_workers=0), strict=True
    ):
        assert waveform.shape == (40, 22_050)
        torch.testing.assert_close(pairs, expected_pairs, rtol=0, atol=0)
        torch.testing.assert_close(waveform, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sample_rate": 0}, "sample_rate"),
        ({"samples": 0}, "samples"),
        ({"gain_db": -1.0}, "gain_db"),
        ({"gain_db": float("nan")}, "gain_db"),
        ({"crop": "middle"}, "crop"),
    ],
)
def test_bad_settings(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ClipDataset(read_manifest(), **settings)


def test_an_index_without_an_epoch():
    with pytest.raises(TypeError, match=r"drawn by \(epoch, clip\)"):
        ClipDataset(read_manifest())[3]  # type: ignore[index]

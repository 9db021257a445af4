"""Labelled clips: what augmentation does to waveforms, labels and spectrograms, and that it is a clip's own."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from audiomae.data import ClipError, Manifest
from audiomae.data.labelled import Augmentation, Example, LabelledClips, class_balanced_weights
from audiomae.data.labels import Labels
from audiomae.seeding import clip_generator, clip_seed

RATE, SAMPLES, SPEC_SIZE = 8000, 1000, (40, 32)
LENGTHS = {"short": 300, "exact": SAMPLES, "long": 2500}
LABELS = {"short": ("a",), "exact": ("b", "c"), "long": ("c",)}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    for name, length in LENGTHS.items():
        sound = np.sin(np.arange(length) / 7 + len(name)) * 0.5
        soundfile.write(tmp_path / f"{name}.wav", sound, RATE, subtype="FLOAT")
    return Manifest([(f"{name}.wav", labels) for name, labels in LABELS.items()], tmp_path)


def clips(manifest: Manifest, augmentation: Augmentation | None = None, seed: int = 0) -> LabelledClips:
    classes = Labels.of(manifest).indices(manifest)
    return LabelledClips(
        manifest,
        classes,
        sample_rate=RATE,
        samples=SAMPLES,
        spec_size=SPEC_SIZE,
        augmentation=augmentation,
        seed=seed,
    )


def sound(manifest: Manifest, name: str) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(f"{manifest.root}/{name}.wav", dtype="float32")[0])


def test_clips_as_they_are(manifest: Manifest) -> None:
    dataset = clips(manifest)
    assert len(dataset) == 3
    for number, name in enumerate(LENGTHS):
        example = dataset[5, number]
        length = min(LENGTHS[name], SAMPLES)
        assert example.length == length
        torch.testing.assert_close(example.waveform[:length], sound(manifest, name)[:length], rtol=0, atol=0)
        assert (example.waveform[length:] == 0).all()
        assert example.target.tolist() == [float(label in LABELS[name]) for label in "abc"]
        assert example.keep_frames.shape == (40,)
        assert example.keep_mels.shape == (32,)
        assert example.keep_frames.all()
        assert example.keep_mels.all()
        assert example.pair.tolist() == [5, number]


def test_roll_rotates_a_part_of_the_clip(manifest: Manifest) -> None:
    dataset = clips(manifest, Augmentation(roll=True))
    offsets = set()
    for epoch in range(8):
        short = dataset[epoch, 0].waveform[:300]
        found = [k for k in range(300) if torch.equal(short, sound(manifest, "short").roll(k))]
        assert found
        offsets.add(found[0])
        draw = clip_generator(0, epoch, 2, "roll")
        start = round(draw.random() * (2500 - SAMPLES))
        part = sound(manifest, "long")[start : start + SAMPLES]
        torch.testing.assert_close(dataset[epoch, 2].waveform, part.roll(int(draw.integers(SAMPLES))), rtol=0, atol=0)
    assert len(offsets) > 4


def test_gain_is_that_of_the_released_code(manifest: Manifest) -> None:
    dataset, plain = clips(manifest, Augmentation(gain=True)), clips(manifest)
    gains = []
    for epoch in range(200):
        gain = clip_generator(0, epoch, 1, "gain").beta(10, 10) + 0.5
        gains.append(gain)
        torch.testing.assert_close(dataset[epoch, 1].waveform, (plain[epoch, 1].waveform * gain).float())
    assert 0.5 < min(gains) < max(gains) < 1.5
    assert abs(np.mean(gains) - 1) < 0.03


def test_mixup_mixes_waveforms_and_labels_alike(manifest: Manifest) -> None:
    dataset = clips(manifest, Augmentation(mixup=1.0))
    shares, partners = [], set()
    for epoch in range(60):
        example = dataset[epoch, 0]
        draw = clip_generator(0, epoch, 0, "mixup")
        draw.random()
        partner, share = int(draw.integers(3)), draw.beta(10, 10)
        names = list(LENGTHS)
        own, other = sound(manifest, "short"), sound(manifest, names[partner])[:300]
        torch.testing.assert_close(example.waveform[:300], (share * own + (1 - share) * other).float())
        assert example.length == 300
        assert (example.waveform[300:] == 0).all()
        expected = [share * (c in LABELS["short"]) + (1 - share) * (c in LABELS[names[partner]]) for c in "abc"]
        torch.testing.assert_close(example.target, torch.tensor(expected, dtype=torch.float32))
        shares.append(share)
        partners.add(partner)
    assert partners == {0, 1, 2}
    assert abs(np.mean(shares) - 0.5) < 0.06


def test_a_shorter_partner_ends_earlier(manifest: Manifest) -> None:
    dataset = clips(manifest, Augmentation(mixup=1.0))
    epoch = next(e for e in range(50) if mixup_partner(e, 1) == 0)
    draw = clip_generator(0, epoch, 1, "mixup")
    draw.random()
    draw.integers(3)
    share = draw.beta(10, 10)
    torch.testing.assert_close(
        dataset[epoch, 1].waveform[300:], (share * sound(manifest, "exact")[300:]).float(), rtol=1e-6, atol=1e-7
    )


def mixup_partner(epoch: int, clip: int) -> int:
    draw = clip_generator(0, epoch, clip, "mixup")
    draw.random()
    return int(draw.integers(3))


def test_mixup_has_its_probability(manifest: Manifest) -> None:
    dataset = clips(manifest, Augmentation(mixup=0.5))
    mixed = sum(not set(dataset[epoch, 0].target.tolist()) <= {0.0, 1.0} for epoch in range(300))
    # A third of the partners is the clip itself, whose labels do not change.
    assert abs(mixed / 300 - 0.5 * 2 / 3) < 0.09


def test_noise_has_its_ratio(manifest: Manifest) -> None:
    clean, noisy = clips(manifest)[0, 1].waveform, clips(manifest, Augmentation(noise_db=20.0))[0, 1].waveform
    ratio = clean.square().sum() / (noisy - clean).square().sum()
    assert 10 * ratio.log10().item() == pytest.approx(20, abs=1e-3)


def test_noise_on_silence_is_silence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(500), RATE)
    manifest = Manifest([("silence.wav", ["a"])], tmp_path)
    assert (clips(manifest, Augmentation(noise_db=20.0))[0, 0].waveform == 0).all()


def test_a_partner_that_cannot_be_read_is_named(manifest: Manifest) -> None:
    dataset = clips(manifest, Augmentation(mixup=1.0))
    Path(manifest.path(0)).unlink()
    epoch = next(e for e in range(50) if mixup_partner(e, 1) == 0)
    with pytest.raises(ClipError, match=r"short\.wav: No such file") as info:
        dataset[epoch, 1]
    assert info.value.clip == 0


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_silence_is_a_sound(tmp_path: Path, level: float) -> None:
    soundfile.write(tmp_path / "silence.wav", np.full(500, level), RATE)
    manifest = Manifest([("silence.wav", ["a"])], tmp_path)
    for augmentation in (None, Augmentation(gain=True, roll=True, mixup=1.0)):
        example = clips(manifest, augmentation)[0, 0]
        assert example.length == 500
        assert example.waveform.isfinite().all()


def test_spec_augment_is_that_of_torchaudio(manifest: Manifest) -> None:
    dataset = clips(manifest, Augmentation(time_mask=20, frequency_mask=8))
    state = torch.get_rng_state()
    removed = []
    for epoch in range(20):
        example = dataset[epoch, 0]
        torch.manual_seed(clip_seed(0, epoch, 0, "spec augment"))
        spec = torch.ones(32, 40)  # torchaudio's spectrograms have frequency first
        spec = torchaudio.transforms.TimeMasking(20)(spec)
        spec = torchaudio.transforms.FrequencyMasking(8)(spec)
        torch.set_rng_state(state)
        expected = spec.bool()
        assert torch.equal(example.keep_mels[:, None] & example.keep_frames[None], expected)
        removed.append(((~example.keep_frames).sum().item(), (~example.keep_mels).sum().item()))
    assert max(frames for frames, _ in removed) > 10
    assert len(set(removed)) > 10
    dataset[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_visit_is_drawn_from_seed_epoch_and_clip(manifest: Manifest) -> None:
    everything = Augmentation(roll=True, mixup=0.5, noise_db=20.0, time_mask=20, frequency_mask=8)
    first, again, other = (clips(manifest, everything, seed) for seed in (3, 3, 4))
    for number in (2, 0, 1):
        same(first[7, number], again[7, number])
    assert not torch.equal(first[7, 0].waveform, first[8, 0].waveform)
    assert not torch.equal(first[7, 0].waveform, other[7, 0].waveform)


def same(example: Example, other: Example) -> None:
    for tensor, expected in zip(example, other, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_parts_of_files_are_clips(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4000).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", noise, RATE, subtype="FLOAT")
    parts = [("long.wav", ["a"], 0.125, 0.05), ("long.wav", ["b"], 0.25, None)]
    dataset = clips(Manifest(parts, tmp_path))
    np.testing.assert_array_equal(dataset[0, 0].waveform[:400], noise[1000:1400])
    assert dataset[0, 0].length == 400
    np.testing.assert_array_equal(dataset[0, 1].waveform, noise[2000:3000])
    beyond = clips(Manifest([("long.wav", ["a"], 0.5, 0.1), ("long.wav", ["b"])], tmp_path))
    with pytest.raises(ClipError, match=r"long.wav: lasts 0.5 s, expected a part of it from 0.5 s on"):
        beyond[0, 0]


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        (Augmentation(time_mask=41), "time_mask is 41, expected at most the 40 of a spectrogram"),
        (Augmentation(frequency_mask=33), "frequency_mask is 33, expected at most the 32 of a spectrogram"),
    ],
)
def test_masks_wider_than_the_spectrogram_are_refused(
    manifest: Manifest, augmentation: Augmentation, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        clips(manifest, augmentation)


def test_class_balanced_weights_sum_over_the_classes_of_a_clip() -> None:
    manifest = Manifest([("1", ["a"]), ("2", ["a", "b"]), ("3", ["b"]), ("4", ["b"]), ("5", ["c"])])
    weights = class_balanced_weights(Labels.of(manifest).indices(manifest))
    a, b, c = 1000 / 2.01, 1000 / 3.01, 1000 / 1.01
    np.testing.assert_allclose(weights, [a, a + b, b, b, c])

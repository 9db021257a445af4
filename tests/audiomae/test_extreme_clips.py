"""Clips of any length, sample rate and number of channels: the right samples, and no more memory than a crop takes."""

import struct
import subprocess
import sys
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from audiomae.data import ClipDataset, ClipError, Manifest, read_waveform, sound_files
from audiomae.data.labelled import LabelledClips
from audiomae.data.labels import Labels

from .sounds import crop_start, dataset_of, needs, noise, write

RATE = 16_000
RATES = (8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400, 192_000)
CHANNELS = (1, 2, 3, 6, 8, 17, 32)
DAY = 24 * 3_600
MIB = 1 << 20


def mean(samples: np.ndarray) -> np.ndarray:
    """Channels added one after the other in float32, as the reader does."""
    mono = samples[:, 0].astype(np.float32)
    for channel in range(1, samples.shape[1]):
        mono += samples[:, channel].astype(np.float32)
    return mono / np.float32(samples.shape[1])


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("rate", RATES)
def test_any_rate_and_number_of_channels(tmp_path: Path, rate: int, channels: int) -> None:
    samples = noise(rate // 10 + 1, channels)
    path = write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    mono = write(tmp_path / "mono.wav", mean(samples), rate, subtype="FLOAT")
    whole = read_waveform(path, RATE)
    assert whole.shape == (-(-len(samples) * RATE // rate),)
    torch.testing.assert_close(whole, read_waveform(mono, RATE), rtol=0, atol=0)
    waveform, _ = dataset_of(path, samples=2_000, gain_db=0.0)[3, 0]
    expected = whole[(crop_start(0, 3, 0, len(whole)) + torch.arange(2_000)) % len(whole)]
    torch.testing.assert_close(waveform, expected, rtol=0, atol=1e-6)


FORMATS = [
    *(pytest.param("WAV", subtype, channels) for subtype in ("PCM_16", "PCM_24", "FLOAT") for channels in (3, 32)),
    *(pytest.param("FLAC", subtype, channels) for subtype in ("PCM_16", "PCM_24") for channels in (1, 2, 3, 8)),
    *(pytest.param("OGG", "VORBIS", channels, marks=needs("OGG")) for channels in (1, 2, 6, 16)),
    *(pytest.param("OGG", "OPUS", channels, marks=needs("OGG")) for channels in (1, 2, 6)),
    *(pytest.param("MP3", None, channels, marks=needs("MP3")) for channels in (1, 2)),
]


@pytest.mark.parametrize(("container", "subtype", "channels"), FORMATS)
def test_blocks_join_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, subtype: str | None, channels: int
) -> None:
    samples = np.sin(np.arange(40_000)[:, None] / 9) * 0.4 + 0.2 * noise(40_000, channels)
    path = write(tmp_path / "a", samples, RATE, format=container, subtype=subtype)
    at_once, _ = sf.read(path, dtype="float32", always_2d=True)
    parts = [(0, 40_000), (12_345, 20_011), (39_999, 1)]

    def read() -> list[torch.Tensor]:
        return [read_waveform(path, RATE, first / RATE, count / RATE) for first, count in parts]

    one_block = read()
    torch.testing.assert_close(one_block[0], torch.from_numpy(mean(at_once)), rtol=0, atol=1e-7)
    for values in (channels - 1, 1_000 * channels, 7_777):
        monkeypatch.setattr(sound_files, "_BLOCK_VALUES", values)
        if values < channels:  # single frames
            parts = parts[2:]
        for part, expected in zip(read(), one_block[-len(parts) :], strict=True):
            torch.testing.assert_close(part, expected, rtol=0, atol=0)
        parts = [(0, 40_000), (12_345, 20_011), (39_999, 1)]


def test_encodings_that_cannot_be_sought_are_skipped_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", noise(40_000), RATE, subtype="GSM610")
    expected = read_waveform(path, RATE, start=1.5, duration=0.5)
    monkeypatch.setattr(sound_files, "_BLOCK_VALUES", 1_001)
    torch.testing.assert_close(read_waveform(path, RATE, start=1.5, duration=0.5), expected, rtol=0, atol=0)
    whole, _ = sf.read(path, dtype="float32")
    torch.testing.assert_close(expected, torch.from_numpy(whole[24_000:32_000]), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 32])
@pytest.mark.parametrize("rate", RATES)
def test_a_clip_of_one_sample(tmp_path: Path, rate: int, channels: int) -> None:
    path = write(tmp_path / "a.wav", np.full((1, channels), 0.5), rate)
    waveform, _ = dataset_of(path, gain_db=0.0)[0, 0]
    assert waveform.shape == (160_000,)
    assert waveform.abs().max() > 0.01  # below 16 kHz that is an impulse without what lies above its Nyquist frequency
    assert waveform.isfinite().all()
    manifest = Manifest([(path, ["a"]), (path, ["b"])])
    sizes = {"sample_rate": RATE, "samples": 1_000, "spec_size": (40, 32)}
    example = LabelledClips(manifest, Labels.of(manifest).indices(manifest), **sizes)[0, 1]
    assert example.length == -(-RATE // rate)


# Long files. Most of what they hold is a hole that takes no room on the disk.


class Day:
    """A WAV or RF64 file of 24 hours, silent but for noise where a crop is taken.

    Args:
        folder: Where to write it.
        rate: Its sample rate, Hz.
        channels: Its channels.
        bits: Of a sample: 16, or 32 for floats.
        samples: Length of the noise, from the beginning of the crop on, at 16 kHz.
    """

    def __init__(self, folder: Path, rate: int, channels: int, bits: int, samples: int):
        self.path, self.seed = folder / f"{rate}-{channels}-{bits}.wav", 0
        length = -(-DAY * rate * RATE // rate)
        start = crop_start(self.seed, 0, 0, length)
        assert start + 160_000 <= length
        # The noise begins at a sample that both rates share, and well before the crop.
        period, own_period = RATE // gcd(rate, RATE), rate // gcd(rate, RATE)
        periods = max(start - 4_000, 0) // period
        self.offset = start - periods * period
        frames = (self.offset + samples + 4_000) * rate // RATE
        block = noise(frames, channels)
        if bits == 16:
            block = (block * 2**15).astype(np.int16)
        self.short = write(folder / "short.wav", block, rate, subtype="PCM_16" if bits == 16 else "FLOAT")
        size = DAY * rate * channels * bits // 8
        frame = channels * bits // 8
        kind = struct.pack("<HHIIHH", 1 if bits == 16 else 3, channels, rate, rate * frame, frame, bits)
        head = b"WAVE" + b"ds64" + struct.pack("<IQQQI", 28, size + 72, size, DAY * rate, 0)
        head = b"RF64\xff\xff\xff\xff" + head + b"fmt " + struct.pack("<I", 16) + kind + b"data\xff\xff\xff\xff"
        try:
            with self.path.open("wb") as file:
                file.write(head)
                file.seek(len(head) + periods * own_period * frame)
                file.write(block.tobytes())
                file.truncate(len(head) + size)
        except OSError as error:
            pytest.skip(f"the file system takes no file of {size:,} bytes: {error}")


LONG = [(8_000, 1, 16), (11_025, 1, 16), (44_100, 2, 16), (48_000, 8, 32), (192_000, 32, 32)]


@pytest.mark.parametrize(("rate", "channels", "bits"), LONG)
def test_a_crop_of_a_day(tmp_path: Path, rate: int, channels: int, bits: int) -> None:
    day = Day(tmp_path, rate, channels, bits, samples=16_000)
    dataset = ClipDataset(Manifest([(str(day.path), ())]), RATE, 16_000, day.seed, gain_db=0.0)
    waveform, _ = dataset[0, 0]
    expected = read_waveform(day.short, RATE)[day.offset : day.offset + 16_000]
    torch.testing.assert_close(waveform, expected, rtol=0, atol=1e-6)
    assert waveform.abs().max() > 0.05
    with pytest.raises(ClipError, match=r"silent from \d+\.\d\d s to \d+\.\d\d s$"):
        dataset[1, 0]
    assert (read_waveform(day.path, RATE, start=DAY - 0.5) == 0).all()


def test_an_hour_of_flac(tmp_path: Path) -> None:
    sound, at = noise(80_000), 3_000 * 8_000
    path = tmp_path / "hour.flac"
    with sf.SoundFile(path, "w", 8_000, 1) as file:
        for first in range(0, 3_600 * 8_000, 400_000):
            block = np.zeros(400_000, np.float32)
            if first == at:
                block[:80_000] = sound[:, 0]
            file.write(block)
    expected = read_waveform(write(tmp_path / "short.flac", np.pad(sound[:, 0], (8_000, 8_000)), 8_000), RATE)
    waveform = read_waveform(path, RATE, start=3_001.0, duration=8.0)
    torch.testing.assert_close(waveform, expected[32_000 : 32_000 + 128_000], rtol=0, atol=0)
    with pytest.raises(ClipError, match="silent from"):
        dataset_of(str(path), samples=16_000, crop="start")[0, 0]


PEAK = """
import re, sys
from audiomae.data import ClipDataset, Manifest, read_waveform

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

path, short, samples = sys.argv[1], sys.argv[2], int(sys.argv[3])
read_waveform(short, 16_000, duration=0.1)  # builds the resampler
try:
    open("/proc/self/clear_refs", "w").write("5")  # a new peak begins
except OSError:
    pass
before = status("VmHWM")
ClipDataset(Manifest([(path, ())]), 16_000, samples)[0, 0]
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell of peaks")
@pytest.mark.parametrize(
    ("rate", "channels", "bits", "limit"), [(16_000, 1, 16, 12), (44_100, 2, 16, 24), (192_000, 32, 32, 80)]
)
def test_a_crop_of_a_day_takes_little_memory(tmp_path: Path, rate: int, channels: int, bits: int, limit: int) -> None:
    day = Day(tmp_path, rate, channels, bits, samples=16_000)
    command = [sys.executable, "-c", PEAK, str(day.path), day.short, "160000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    peak = int(done.stdout)
    assert 0 <= peak < limit * MIB, f"{peak / MIB:.1f} MiB"

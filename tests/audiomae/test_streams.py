from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from audiomae.data import ClipError, read_waveform
from audiomae.data.sound_files import SilentClipError
from audiomae.data.streams import open_stream

# Container, sample format, sample rate and channels.
SOUNDS = [
    ("WAV", "PCM_16", 16_000, 1),
    ("WAV", "PCM_U8", 8_000, 2),
    ("WAV", "FLOAT", 192_000, 3),
    ("WAV", "IMA_ADPCM", 11_025, 1),
    ("FLAC", "PCM_24", 44_100, 2),
    ("MP3", "MPEG_LAYER_III", 44_100, 2),
    ("MP3", "MPEG_LAYER_III", 11_025, 1),
    ("OGG", "VORBIS", 48_000, 2),
    ("OGG", "OPUS", 48_000, 1),
    ("AU", "ULAW", 12_345, 1),
]


def noise(frames: int, channels: int) -> np.ndarray:
    sound = np.cumsum(np.random.default_rng(frames).standard_normal((frames, channels)), axis=0)
    return 0.9 * sound / np.abs(sound).max()


@pytest.mark.parametrize(("container", "subtype", "rate", "channels"), SOUNDS)
def test_blocks_are_the_whole_clip(tmp_path, container, subtype, rate, channels):
    path = str(tmp_path / "sound")
    sf.write(path, noise(int(1.7 * rate), channels), rate, format=container, subtype=subtype)
    for segment in ((0.0, None), (0.5, 0.8), (1.3, None)):
        whole = read_waveform(path, 16_000, *segment)
        for size in (3_001, len(whole), 1 << 20):
            with open_stream(path, 16_000, segment) as stream:
                assert (stream.length, stream.seconds) == (len(whole), len(whole) / 16_000)
                assert (stream.file_rate, stream.channels, stream.format) == (rate, channels, f"{container} {subtype}")
                blocks = list(stream.blocks(size))
            assert all(len(block) == size for block in blocks[:-1])
            torch.testing.assert_close(torch.cat(blocks), whole, rtol=0, atol=0)


def test_blocks_of_a_file_that_cannot_be_sought_in(tmp_path, monkeypatch):
    path = str(tmp_path / "a.wav")
    sf.write(path, noise(30_000, 2), 22_050)
    whole = read_waveform(path, 16_000)
    monkeypatch.setattr(sf.SoundFile, "seekable", lambda self: False)
    read, decoded = sf.SoundFile.read, []

    def counting(self, *args, **kwargs):
        samples = read(self, *args, **kwargs)
        decoded.append(len(samples))
        return samples

    monkeypatch.setattr(sf.SoundFile, "read", counting)
    for start in (0, 1_600):
        decoded.clear()
        with open_stream(path, 16_000, (start / 16_000, None)) as stream:
            torch.testing.assert_close(torch.cat(list(stream.blocks(5_003))), whole[start:], rtol=0, atol=0)
        assert sum(decoded) == 30_000  # each sample once


def _with_nan(sound: np.ndarray) -> np.ndarray:
    sound[-2] = np.nan
    return sound


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_with_nan, "holds samples that are not finite"),
        (lambda sound: np.append(sound, 1e12), r"holds a sample of 1e\+12, expected at most 1, or 4.295e\+09"),
    ],
)
def test_errors_come_where_they_are(tmp_path, change, error):
    path = tmp_path / "a.wav"
    sf.write(path, change(noise(50_000, 1)[:, 0]), 16_000, subtype="DOUBLE")
    with open_stream(str(path), 16_000) as stream:
        blocks = stream.blocks(10_000)
        for _ in range(4):
            next(blocks)
        with pytest.raises(ClipError, match=rf"a\.wav: {error}"):
            list(blocks)


def test_files_that_are_cut_off(tmp_path):
    path = tmp_path / "a.mp3"
    sf.write(path, noise(200_000, 1), 16_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with open_stream(str(path), 16_000) as stream, pytest.raises(ClipError, match=r"a\.mp3: cut off, its header tells"):
        list(stream.blocks(10_000))


@pytest.mark.parametrize("sound_at", [None, 0, 22_222, 49_999])
def test_finding_sound(tmp_path, sound_at):
    levels = np.zeros(50_000)
    if sound_at is not None:
        levels[sound_at] = 0.5
    sf.write(tmp_path / "a.wav", levels, 16_000)
    with open_stream(str(tmp_path / "a.wav"), 16_000) as stream:
        if sound_at is None:
            with pytest.raises(SilentClipError, match=r"a\.wav: silent$"):
                stream.find_sound(10_000)
        else:
            stream.find_sound(10_000)


@pytest.mark.parametrize(
    ("segment", "error"),
    [
        ((2.0, None), "lasts 1 s, expected a part of it from 2 s on"),
        ((0.0, 1e-5), "a part of 1e-05 s is less than a sample at 16000 Hz"),
    ],
)
def test_parts_that_are_not_there(tmp_path, segment, error):
    sf.write(tmp_path / "a.wav", noise(16_000, 1), 16_000)
    with pytest.raises(ClipError, match=error), open_stream(str(tmp_path / "a.wav"), 16_000, segment):
        pass
    with (
        pytest.raises(ClipError, match=r"gone\.wav: No such file or directory"),
        open_stream(str(Path("gone.wav")), 16_000),
    ):
        pass

"""Files as windows: the same windows as those of a waveform, and batches over all clips."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from audiomae import EncoderConfig
from audiomae.data import Manifest, ManifestError, read_waveform
from audiomae.data.windowed import ClipWindows, UnreadableClip, Window, hear_clips, list_clips
from audiomae.windows import Windows

RATE = 16_000
CONFIG = EncoderConfig(spec_size=(48, 128))
WINDOWS = Windows.of(CONFIG)


def write_noise(path: Path, samples: int, seed: int = 0) -> str:
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(samples), RATE)
    return str(path)


def listed(*paths: str) -> Manifest:
    return Manifest([(path, ()) for path in paths], root="")


def test_short_clips_share_batches(tmp_path: Path) -> None:
    paths = [write_noise(tmp_path / f"{number}.wav", 3_000 + number, seed=number) for number in range(10)]
    paths.insert(4, str(tmp_path / "missing.wav"))
    sizes = []

    def model(windows: Tensor, lengths: Tensor) -> list[Tensor]:
        assert windows.shape == (len(lengths), WINDOWS.samples)
        sizes.append(len(lengths))
        return list(lengths)

    heard = list(hear_clips(ClipWindows(listed(*paths), WINDOWS), model, batch_size=8))
    assert sizes == [7, 3]
    assert [clip.clip for clip in heard] == list(range(11))
    assert isinstance(heard.pop(4), UnreadableClip)
    assert [int(clip.results[0]) for clip in heard] == [3_000 + number for number in range(10)]


def test_sources_are_files_folders_and_manifests(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    inside = write_noise(tmp_path / "b" / "c.wav", 400)
    (tmp_path / "list.csv").write_text("path,label,start,duration\nx.wav,bark,,\ny.wav,meow,1.5,2\n")
    (tmp_path / "list.json").write_text('{"data": [{"wav": "z.wav", "labels": "/m/1,/m/2"}]}')
    manifest = list_clips(["a.wav", *(str(tmp_path / name) for name in ("b", "list.csv", "list.json")), "a.wav"])
    clips = [(manifest.path(clip), manifest.labels(clip), manifest.segment(clip)) for clip in range(len(manifest))]
    whole = (0.0, None)
    assert clips == [
        ("a.wav", (), whole),
        (inside, (), whole),
        (str(tmp_path / "x.wav"), ("bark",), whole),
        (str(tmp_path / "y.wav"), ("meow",), (1.5, 2.0)),
        (str(tmp_path / "z.wav"), ("/m/1", "/m/2"), whole),
        ("a.wav", (), whole),
    ]
    with pytest.raises(ManifestError, match="clip 0: '' is no path"):
        list_clips([""])


def test_what_cannot_be_a_clip_is_named_and_nothing_waits(tmp_path: Path) -> None:
    path = write_noise(tmp_path / "a.wav", 400)
    os.mkfifo(tmp_path / "pipe.wav")
    clips = Manifest([(path, (), 0.0, 1e-6), (path, (), 1e9, 1.0), (str(tmp_path / "pipe.wav"), ())], root="")
    assert list(ClipWindows(clips, WINDOWS)) == [
        UnreadableClip(0, f"{path}: a part of 1e-06 s is less than a sample at 16000 Hz"),
        UnreadableClip(1, f"start of 1000000000.0 s lies outside {path}, which lasts 0.025 s"),
        UnreadableClip(2, f"{tmp_path}/pipe.wav: is no regular file"),
    ]


@pytest.mark.parametrize(("patch_size", "stride", "frames"), [((16, 16), 16, 48), ((15, 16), 6, 50), ((16, 16), 4, 31)])
def test_windows_of_files_are_those_of_waveforms(
    tmp_path: Path, patch_size: tuple[int, int], stride: int, frames: int
) -> None:
    config = replace(CONFIG, spec_size=(frames, 128), patch_size=patch_size, patch_stride=(stride, 16))
    windows = Windows.of(config)
    for end in (-1, 0, 1):
        for steps in (0, 1, windows.steps - 1, windows.steps, 2 * windows.steps - 1):
            samples = windows.half_patch + steps * windows.step + end
            path = write_noise(tmp_path / "clip.wav", samples)
            waveform = read_waveform(path, RATE)
            cut, lengths = windows.cut(waveform[None])
            items = list(ClipWindows(listed(path), windows))
            assert len(items) == cut.shape[1] == len(lengths)
            for item, expected, length in zip(items, cut[0], lengths.tolist(), strict=True):
                assert isinstance(item, Window)
                assert len(item.waveform) == length
                torch.testing.assert_close(item.waveform, expected[:length], rtol=0, atol=0)
            assert [item.total for item in items if isinstance(item, Window)] == [None] * (len(items) - 1) + [samples]

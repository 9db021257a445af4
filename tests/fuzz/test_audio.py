"""Sound files with headers that lie, from libsndfile's formats and by hand."""

import math
from pathlib import Path

import pytest
import torch

from audiomae.data import ClipDataset, ClipError, Manifest, read_waveform
from audiomae.data.headers import read_header

from .fuzzing import Fuzz
from .sounds import RECORDED, Recorded, Sound, recorded, recordings, riffs
from .worker import Target

RATE = 16_000
NAME = "clip.wav"


def write(folder: Path, case: Sound) -> None:
    (folder / NAME).write_bytes(case.data())


def header(folder: Path) -> None:
    seconds, rate = read_header(str(folder / NAME))
    assert 0 < seconds < math.inf, seconds
    assert rate >= 1, rate


def beginning(folder: Path) -> None:
    check(read_waveform(folder / NAME, RATE, duration=1.0), RATE)


def whole(folder: Path) -> None:
    seconds, _ = read_header(str(folder / NAME))
    if seconds < 100:
        check(read_waveform(folder / NAME, RATE), 101 * RATE)


def crop(folder: Path) -> None:
    clips = ClipDataset(Manifest([(NAME, ())], folder), RATE, RATE)
    waveform, _ = clips[0, 0]
    check(waveform, RATE)
    assert len(waveform) == RATE, len(waveform)


def check(waveform: torch.Tensor, most: int) -> None:
    assert waveform.dtype == torch.float32, waveform.dtype
    assert waveform.dim() == 1, waveform.shape
    assert 1 <= len(waveform) <= most, len(waveform)
    assert waveform.isfinite().all(), "samples that are not finite"


TARGET = Target(write, (header, beginning, whole, crop), (ClipError,))
USUAL = [name for name in RECORDED if name.split()[0] in ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF", "RF64", "W64")]


@pytest.mark.share(10)
def test_wav_headers(fuzz: Fuzz):
    fuzz(TARGET, riffs())


@pytest.mark.share(10)
def test_usual_formats(fuzz: Fuzz):
    fuzz(TARGET, recordings(USUAL))


@pytest.mark.share(6)
def test_other_formats(fuzz: Fuzz):
    fuzz(TARGET, recordings([name for name in RECORDED if name not in USUAL]))


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_files_are_whole(name: str, tmp_path: Path):
    write(tmp_path, Recorded(name))
    assert (tmp_path / NAME).read_bytes() == recorded(name)
    for read in TARGET.read:
        read(tmp_path)

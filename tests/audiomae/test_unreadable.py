"""Files that cannot be read, and silence."""

import os
import pickle
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from audiomae.data import ClipDataset, ClipError, Manifest, read_waveform

from .sounds import crop_start, dataset_of, needs, noise, write


def cut(path: str, share: float) -> None:
    os.truncate(path, int(os.path.getsize(path) * share))


def unreadable(kind: str, folder) -> str:
    path = str(folder / f"{kind}.wav")
    if kind == "folder":
        os.mkdir(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        Path(path).symlink_to("/dev/zero")
    elif kind == "loop":
        Path(path).symlink_to(path)
    elif kind == "beyond a file":
        path = f"{write(folder / 'file.wav', noise(10))}/a.wav"
    elif kind == "long name":
        path = str(folder / ("a" * 300 + ".wav"))
    elif kind == "text":
        Path(path).write_text("hello " * 1_000)
    elif kind == "void":
        Path(path).touch()
    elif kind == "empty":
        write(path, noise(0))
    elif kind in ("nan", "infinite"):
        write(path, np.array([0.1, {"nan": np.nan, "infinite": np.inf}[kind]], np.float32), subtype="FLOAT")
    elif kind == "infinite together":
        write(path, np.full((2, 2), 3e38, np.float32), subtype="FLOAT")
    elif kind == "huge":
        write(path, np.array([0.1, -1e10], np.float32), subtype="FLOAT")
    elif kind == "cut":
        path = write(folder / "cut.flac", noise(80_000))
        cut(path, 0.6)
    elif kind == "endless":
        path = write(folder / "endless.flac", noise(80_000))
        with open(path, "r+b") as file:  # the 36 bits of the number of samples, as an encoder leaves them in a pipe
            file.seek(21)
            upper = file.read(1)[0] & 0xF0
            file.seek(21)
            file.write(bytes([upper, 0, 0, 0, 0]))
    elif kind == "raw":
        path = str(folder / "a.raw")
        Path(path).write_bytes(bytes(1_000))
    elif kind == "rate":
        write(path, noise(10), rate=2_000_000)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "No such file"),
        ("folder", "is a folder"),
        ("pipe", "is no regular file"),
        ("device", "is no regular file"),
        ("loop", "Too many levels of symbolic links"),
        ("beyond a file", "Not a directory"),
        ("long name", "File name too long"),
        ("text", "cannot be read as audio"),
        ("void", "cannot be read as audio"),
        ("empty", "holds no samples"),
        ("nan", "not finite"),
        ("infinite", "not finite"),
        ("infinite together", "not finite"),
        ("huge", r"holds a sample of 1e\+10, expected at most 1, or 4\.295e\+09"),
        ("cut", "cannot be read as audio"),
        ("endless", "does not tell its length"),
        ("raw", "no header"),
        ("rate", "2000000 Hz"),
    ],
)
def test_unreadable_files(tmp_path, kind, reason):
    path = unreadable(kind, tmp_path)
    with pytest.raises(ClipError, match=reason) as info:
        read_waveform(path, 16_000)
    assert str(info.value).startswith(f"{path}: ")
    assert "\n" not in str(info.value)
    with pytest.raises(ClipError, match=reason) as info:
        dataset_of(write(tmp_path / "fine.wav", noise(10)), path, crop="start")[0, 1]
    assert info.value.clip == 1


@needs("MP3")
def test_a_file_that_ends_before_its_header_says(tmp_path):
    path = write(tmp_path / "a.mp3", noise(80_000))
    cut(path, 0.6)
    with pytest.raises(ClipError, match="cut off, its header tells of 80000 samples, but it ends before sample 80000"):
        read_waveform(path, 16_000)
    assert read_waveform(path, 16_000, duration=1.0).shape == (16_000,)


@pytest.mark.parametrize("form", ["WAV", "WAVEX", "AIFF", "AU"])
def test_a_file_without_the_end_of_its_samples(tmp_path, form):
    path = write(tmp_path / "a.wav", noise(80_000), format=form)
    cut(path, 0.995)  # as a recorder writes that counts too much
    assert len(read_waveform(path, 16_000)) == pytest.approx(79_600, abs=100)
    cut(path, 0.6)
    told = r"its header tells of 16000\d bytes of samples, but it holds 95\d\d\d$"
    with pytest.raises(ClipError, match=rf"a\.wav: cut off, {told}"):
        read_waveform(path, 16_000)


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\xf0\xff\x7f"])
def test_a_length_that_a_pipe_left_open_is_that_of_the_file(tmp_path, length):
    path = write(tmp_path / "a.wav", noise(80_000))
    content = Path(path).read_bytes()
    at = content.index(b"data") + 4
    Path(path).write_bytes(content[:4] + length + content[8:at] + length + content[at + 4 :])
    assert read_waveform(path, 16_000).shape == (80_000,)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path / "a.wav", noise(10))
    os.chmod(path, 0)
    with pytest.raises(ClipError, match=r"a\.wav: Permission denied"):
        read_waveform(path, 16_000)


def test_what_the_file_system_says_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", noise(10))
    Path(path).write_bytes(b"")  # libsndfile fails on it, and so does opening it to find out why
    monkeypatch.setattr("builtins.open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(ClipError, match=r"a\.wav: Permission denied"):
        read_waveform(path, 16_000)


def test_more_samples_than_memory_holds(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", noise(10))
    monkeypatch.setattr("audiomae.data.sound_files.np.empty", Mock(side_effect=MemoryError))
    with pytest.raises(ClipError, match=r"a\.wav: its 10 samples do not fit into memory"):
        read_waveform(path, 16_000)


def test_the_error_can_leave_a_worker(tmp_path):
    with pytest.raises(ClipError) as info:
        dataset_of(str(tmp_path / "missing.wav"))[0, 0]
    error = info.value
    assert (error.clip, pickle.loads(pickle.dumps(error)).clip) == (0, 0)
    assert type(error)(str(error)).clip is None  # as a DataLoader raises it anew
    for copy in (pickle.loads(pickle.dumps(error)), type(error)(str(error))):
        assert type(copy) is ClipError
        assert str(copy) == str(error)


def test_a_part_that_is_less_than_a_sample(tmp_path):
    path = write(tmp_path / "a.wav", noise(10))
    with pytest.raises(ClipError, match=r"a\.wav: a part of 1e-05 s is less than a sample at 16000 Hz"):
        ClipDataset(Manifest([(path, (), 0.0, 1e-5)]))[0, 0]


# Silence


@pytest.mark.parametrize("level", [0.0, 0.25])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("length", [2, 500, 1_000, 5_000])
def test_silence_is_refused(tmp_path, level, rate, length):
    path = write(tmp_path / "a.wav", np.full(rate * length // 1_000, level), rate)
    dataset = dataset_of(path, path, samples=16_000)
    with pytest.raises(ClipError, match=r"a\.wav: silent") as info:
        dataset[0, 1]
    assert info.value.clip == 1
    assert str(info.value).endswith(": silent") == (length <= 1_000)
    assert len(read_waveform(path, 16_000)) == -(-(rate * length // 1_000) * 16_000 // rate)


def test_a_silent_crop_is_named(tmp_path):
    sound = np.zeros(100_000)
    sound[50_000:51_000] = noise(1_000)[:, 0]
    path = write(tmp_path / "a.wav", sound, 10_000)
    reasons = {}
    for epoch in range(40):
        start = crop_start(0, epoch, 0, 100_000) / 10_000
        silent = not (start < 5.1 and start + 3 > 5)
        try:
            dataset_of(path, sample_rate=10_000, samples=30_000)[epoch, 0]
            assert not silent, start
        except ClipError as error:
            assert silent, start
            reasons[start] = str(error)
    for start, reason in reasons.items():
        expected = (
            f"from {start:.2f} s to {start + 3:.2f} s"
            if start <= 7
            else f"from {start:.2f} s to 10.00 s and from 0.00 s to {start - 7:.2f} s"
        )
        assert reason == f"{path}: silent {expected}"
    assert min(reasons) <= 7 < max(reasons)
    part = ClipDataset(Manifest([(path, (), 6.0, 2.0)]), 10_000, 10_000, crop="start")
    with pytest.raises(ClipError, match=r"silent from 6\.00 s to 7\.00 s"):
        part[0, 0]


def test_channels_that_cancel_each_other_are_silent(tmp_path):
    path = write(tmp_path / "a.wav", noise(100) * [1, -1], subtype="FLOAT")
    with pytest.raises(ClipError, match="silent"):
        dataset_of(path)[0, 0]


def test_crops_that_go_on_with_another_level_are_heard(tmp_path):
    path = write(tmp_path / "step.wav", np.repeat([0.0, 0.5], 1_000))
    dataset = dataset_of(path, samples=1_000, gain_db=0.0)
    for epoch in range(5):
        assert set(dataset[epoch, 0][0].tolist()) == {0.0, 0.5}


@pytest.mark.parametrize("level", [0.0, 0.25])
@pytest.mark.parametrize("rate", [8_000, 16_000, 192_000])
def test_a_single_sample_is_no_silence(tmp_path, level, rate):
    waveform, _ = dataset_of(write(tmp_path / "a.wav", [level], rate), samples=1_000)[0, 0]
    assert waveform.shape == (1_000,)
    assert waveform.isfinite().all()

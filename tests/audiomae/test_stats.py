import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.utils.data._utils import signal_handling
from torchaudio.compliance.kaldi import fbank

from audiomae.data import read_manifest, read_waveform, stats
from audiomae.data.log_mel_stats import Moments, StatsError, read_stats
from audiomae.data.parallel import WorkerError, map_clips
from audiomae.data.stats import main
from audiomae.seeding import clip_generator


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as info:
        main([str(argument) for argument in arguments])
    assert isinstance(info.value.code, int)
    return info.value.code, *capsys.readouterr()


def noise(seed: int, frames: int, channels: int = 1) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).standard_normal((frames, channels)).clip(-3, 3)


def kaldi(waveform: np.ndarray) -> np.ndarray:
    clip = torch.from_numpy(waveform)[None]
    return fbank(
        clip - clip.mean(), htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128, dither=0
    ).numpy()


@pytest.mark.parametrize("shift", [0.0, -4.3, 1e7])
def test_moments_of_parts_are_those_of_the_whole(shift):
    draw = np.random.default_rng(3)
    values = shift + draw.standard_normal(10_007)
    parts = np.split(values, np.sort(draw.integers(0, len(values), 40)))  # some are empty
    merged = Moments()
    for part in parts:
        merged = merged.merge(Moments.of(part))
    assert merged.count == len(values)
    assert merged.mean == pytest.approx(values.mean(), rel=1e-14, abs=1e-14)
    assert merged.std == pytest.approx(values.std(), rel=1e-8 if shift == 1e7 else 1e-13)


@pytest.mark.parametrize("whole", [False, True])
def test_mean_and_std_of_the_demo_clips_are_those_of_a_plain_loop(tmp_path, capsys, whole):
    manifest = read_manifest()
    values = []
    for clip in range(len(manifest)):
        sound = read_waveform(manifest.path(clip), 16_000).numpy()
        if whole:
            crops = [sound[begin : begin + 8_000] for begin in range(0, len(sound), 8_000)]
        else:
            start = int(clip_generator(7, 0, clip, "crop").integers(len(sound)))
            crops = [np.take(sound, range(start, start + 8_000), mode="wrap")]
        values += [kaldi(crop).ravel() for crop in crops if len(crop) >= 400]
    together = np.concatenate(values).astype(np.float64)
    flags = ["--whole"] if whole else []
    code, out, err = run(capsys, "--seconds", 0.5, "--seed", 7, "--out", tmp_path / "a.json", *flags, "--workers", 0)
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["mean"] == pytest.approx(together.mean(), rel=1e-6)
    assert found["std"] == pytest.approx(together.std(), rel=1e-6)
    assert found["from"] == {
        "clips": 126,
        "frames": len(together) // 128,
        "whole": whole,
        "seconds": 0.5,
        "seed": 7,
    }
    printed = re.search(r"^log-mel: mean (\S+), std (\S+)$", out, re.MULTILINE)
    assert printed is not None
    assert [float(number) for number in printed.groups()] == pytest.approx([together.mean(), together.std()], rel=1e-5)
    assert out.endswith(f"python -m audiomae.pretrain --stats {tmp_path / 'a.json'}\n")
    read = read_stats(tmp_path / "a.json")
    assert (read.mean, read.std, read.sample_rate, read.num_mels) == (found["mean"], found["std"], 16_000, 128)


def test_any_number_of_processes_finds_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stats, "_CHUNK", 17)
    for workers in (0, 1, 2):
        assert run(capsys, "--seconds", 0.5, "--workers", workers, "--out", tmp_path / f"{workers}.json")[0] == 0
    alone = (tmp_path / "0.json").read_bytes()
    assert (tmp_path / "1.json").read_bytes() == alone
    assert (tmp_path / "2.json").read_bytes() == alone


def test_what_headers_tell(tmp_path, capsys):
    sf.write(tmp_path / "a.wav", noise(0, 8_000), 8_000)
    sf.write(tmp_path / "b.flac", noise(1, 132_300, 2), 44_100, subtype="PCM_24")
    sf.write(tmp_path / "c.wav", noise(2, 96_000, 3), 192_000, subtype="FLOAT")
    rows = ["path,start,duration", "a.wav,,", "b.flac,0.5,1.5", "b.flac,2.5,", "c.wav,,"]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    code, out, _ = run(capsys, tmp_path / "list.csv", "--out", tmp_path / "s.json", "--workers", 0, "--num-mels", 64)
    assert code == 0, out
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["clips"], found["fine"], found["faults"], found["num_mels"]) == (4, 4, [], 64)
    assert found["manifest"] == str(tmp_path / "list.csv")
    assert found["hours"] == pytest.approx((1 + 1.5 + 0.5 + 0.5) / 3600)
    assert (found["shortest"], found["longest"]) == (0.5, 1.5)
    assert found["sample_rates"] == {"8000": 1, "44100": 2, "192000": 1}
    assert found["channels"] == {"1": 1, "2": 2, "3": 1}
    assert found["formats"] == {"FLAC PCM_24": 2, "WAV PCM_16": 1, "WAV FLOAT": 1}
    lengths = {bar["from"]: (bar["below"], bar["clips"]) for bar in found["lengths"] if bar["clips"]}
    assert lengths == {0.5: (1.0, 2), 1.0: (2.0, 2)}
    assert re.search(r"^ +0\.5 to 1 +2 +#{44}\s*$", out, re.MULTILINE)
    assert max(map(len, out.splitlines()[1:-1])) <= 80


@pytest.fixture
def faulty(tmp_path) -> Path:
    """A folder with two fine clips and others."""
    root = tmp_path / "sounds"
    root.mkdir()
    sf.write(root / "fine.wav", noise(0, 20_000), 16_000)
    sf.write(root / "fine too.flac", noise(1, 20_000, 2), 22_050)
    (root / "empty.wav").touch()
    (root / "text.flac").write_text("no sound")
    (root / "gone.wav").symlink_to(root / "nowhere.wav")
    sf.write(root / "silent.wav", np.full(9_000, 0.25), 16_000)
    late = noise(2, 400_000)[:, 0]
    late[-3] = np.nan
    sf.write(root / "late.wav", late, 16_000, subtype="FLOAT")
    late[-3] = 0
    sf.write(root / "cut.flac", late, 16_000)
    whole = (root / "cut.flac").read_bytes()
    (root / "cut.flac").write_bytes(whole[: len(whole) * 9 // 10])
    return root


def test_broken_missing_and_silent_clips(faulty, tmp_path, capsys):
    out_file = tmp_path / "s.json"
    code, out, _ = run(capsys, faulty, "--whole", "--workers", 2, "--names", 3, "--out", out_file)
    assert code == 1
    found = json.loads(out_file.read_text())
    kinds = {Path(fault["path"]).name: (fault["kind"], fault["reason"]) for fault in found["faults"]}
    cut = kinds.pop("cut.flac")
    assert cut[0] == "broken"
    assert "cut off" in cut[1] or "flac decoder" in cut[1]
    assert kinds == {
        "empty.wav": ("broken", "cannot be read as audio (Format not recognised)"),
        "text.flac": ("broken", "cannot be read as audio (Format not recognised)"),
        "gone.wav": ("missing", "No such file or directory"),
        "silent.wav": ("silent", "silent"),
        "late.wav": ("broken", "holds samples that are not finite"),
    }
    assert (found["clips"], found["fine"], found["from"]["clips"]) == (8, 2, 2)
    assert (found["broken"], found["missing"], found["silent"]) == (4, 1, 1)
    assert found["hours"] == pytest.approx((20_000 / 16_000 + 20_000 / 22_050) / 3600, rel=1e-4)
    assert f"\nmissing: 1\n  {faulty / 'gone.wav'}: No such file or directory\nbroken: 4\n" in out
    assert "\n  and 1 more\nsilent: 1\n" in out
    assert all(np.isfinite([found["mean"], found["std"]]))
    fine = tmp_path / "fine.csv"
    fine.write_text("path\nsounds/fine too.flac\nsounds/fine.wav\n")
    assert run(capsys, fine, "--whole", "--workers", 0, "--out", tmp_path / "fine.json")[0] == 0
    assert read_stats(tmp_path / "fine.json") == read_stats(out_file)


def test_a_crop_finds_what_is_wrong_with_it_alone(faulty, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("path\nsounds/late.wav\nsounds/silent.wav\nsounds/text.flac\nsounds/fine.wav\n")
    code, _, _ = run(capsys, tmp_path / "a.csv", "--seconds", 1, "--workers", 0, "--out", tmp_path / "s.json")
    assert code == 1
    found = json.loads((tmp_path / "s.json").read_text())
    assert [(fault["clip"], fault["kind"]) for fault in found["faults"]] == [(1, "silent"), (2, "broken")]


def test_a_silent_crop_leaves_a_clip_out_of_the_moments_alone(tmp_path, capsys):
    sf.write(tmp_path / "a.wav", noise(0, 20_000), 16_000)
    sf.write(tmp_path / "b.wav", np.append(np.zeros(1_600_000), noise(1, 1_600)), 16_000)  # silent but for its end
    sf.write(tmp_path / "c.wav", np.zeros(1_600_000), 16_000)
    (tmp_path / "a.csv").write_text("path\na.wav\n")
    (tmp_path / "b.csv").write_text("path\na.wav\nb.wav\n")
    flags = "--seconds", 1, "--workers", 0, "--out"
    code, out, _ = run(capsys, tmp_path / "b.csv", *flags, tmp_path / "b.json")
    assert code == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert (found["clips"], found["fine"], found["silent"], found["silent_crop"]) == (2, 2, 0, 1)
    assert found["hours"] == pytest.approx((20_000 + 1_601_600) / 16_000 / 3600)
    assert (found["longest"], found["from"]["clips"]) == (100.1, 1)
    assert found["sample_rates"] == {"16000": 2}
    assert sum(bar["clips"] for bar in found["lengths"]) == 2
    (fault,) = found["faults"]
    assert (fault["clip"], fault["kind"]) == (1, "silent_crop")
    assert re.fullmatch(r"silent from \d+\.\d\d s to \d+\.\d\d s", fault["reason"])
    assert f"\nsilent crop: 1\n  {tmp_path / 'b.wav'}: silent from " in out
    assert run(capsys, tmp_path / "a.csv", *flags, tmp_path / "a.json")[0] == 0
    assert read_stats(tmp_path / "a.json") == read_stats(tmp_path / "b.json")

    code, _, _ = run(capsys, tmp_path, *flags, tmp_path / "s.json")
    assert code == 1
    found = json.loads((tmp_path / "s.json").read_text())
    kinds = [(fault["clip"], fault["kind"], fault["reason"]) for fault in found["faults"]]
    assert kinds[1:] == [(2, "silent", "silent")]  # all of it
    assert (found["fine"], found["silent"], found["silent_crop"]) == (2, 1, 1)


def test_a_sample_of_the_clips(tmp_path, capsys):
    def sample(name: str, *flags: object) -> dict:
        code, _, _ = run(capsys, "--seconds", 0.5, "--workers", 0, "--out", tmp_path / name, *flags)
        assert code == 0
        return json.loads((tmp_path / name).read_text())

    some, again = sample("a.json", "--clips", 10), sample("b.json", "--clips", 10)
    other, every = sample("c.json", "--clips", 10, "--seed", 1), sample("d.json", "--clips", 1_000)
    assert some == again
    assert some["mean"] != other["mean"]
    assert (some["from"]["clips"], every["from"]["clips"]) == (10, 126)
    assert some["fine"] == every["fine"] == 126  # headers of all
    assert some["hours"] == every["hours"]


def test_names_that_no_terminal_can_show(tmp_path, capsys):
    name = os.fsencode(tmp_path) + b"/a\xff\x1b[31m\n.wav"
    with open(name, "wb") as file:
        file.write(b"no sound")
    sf.write(tmp_path / "b.wav", noise(0, 9_000), 16_000)
    code, out, _ = run(capsys, tmp_path, "--workers", 0, "--out", tmp_path / "s.json")
    assert code == 1
    assert f"  {tmp_path}/a\\udcff\\x1b[31m\\n.wav: cannot be read as audio (Format not recognised)\n" in out
    (fault,) = json.loads((tmp_path / "s.json").read_text())["faults"]
    assert os.fsencode(fault["path"]) == name


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere"], "no such file or folder: nowhere"),
        (["empty"], "empty: no audio files in it or below"),
        (["text.csv"], "text.csv: expected a column path or file or filename or wav, found ['nothing']"),
        (["bad.csv"], "no mean and std: 2 of 2 clips cannot be used, the first is ./gone.wav (No such file"),
        (["short.csv", "--whole"], "no mean and std: no clip has a frame"),
        (["outside.csv"], "'../a.wav' lies outside the folder of the list"),
        (["fine.csv", "--out", "nowhere/s.json"], "nowhere/s.json cannot be written, expected a file in a folder that"),
        (["fine.csv", "--out", "empty"], "empty cannot be written, expected a file in a folder that is there"),
        (["fine.csv", "--seconds", "0.01"], "seconds is 0.01, expected at least a frame of the spectrogram"),
        (["fine.csv", "--num-mels", "2"], "num_mels must be at least 3, got 2"),
    ],
)
def test_what_cannot_be_done(tmp_path, capsys, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.csv").write_text("nothing\n")
    Path("bad.csv").write_text("path\ngone.wav\nbroken.wav\n")
    Path("broken.wav").write_text("no sound")
    sf.write("short.wav", noise(0, 300), 16_000)
    Path("short.csv").write_text("path\nshort.wav\n")
    Path("fine.csv").write_text("path\nshort.wav\n")
    Path("outside.csv").write_text("path\n../a.wav\n")
    code, out, err = run(capsys, *arguments, "--workers", 0)
    assert (code, out) == (2, "")
    assert err.startswith("audiomae.data.stats: error: ")
    assert err.count("\n") == 1
    assert error in err


@pytest.mark.parametrize(
    ("flag", "value", "error"),
    [
        ("--clips", 0, "clips is 0, expected at least 1"),
        ("--workers", -1, "workers is -1, expected at least 0"),
        ("--seconds", "inf", "seconds is inf, expected a sample at least"),
    ],
)
def test_settings_that_make_no_sense(capsys, flag, value, error):
    code, out, err = run(capsys, flag, value)
    assert code == 2
    assert error in out + err


GOOD = {
    "schema": "audiomae.data.stats",
    "version": 1,
    "mean": -4.0,
    "std": 2,
    "sample_rate": 16_000,
    "num_mels": 128,
    "more": [],
}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no JSON (Expecting value: line 1 column 1 (char 0)), expected what audiomae.data.stats --out writes"),
        ("[" * 100_000, "no statistics but deeply nested JSON"),
        ("[]", "no statistics, expected what audiomae.data.stats --out writes"),
        ('{"mean": 1, "std": 2}', "no statistics, expected what audiomae.data.stats --out writes"),
        ({"version": 2}, "version is 2, this package reads 1"),
        ({"mean": None}, "mean is None, expected a finite number"),
        ({"mean": "1"}, "mean is '1', expected a finite number"),
        ({"mean": True}, "mean is True, expected a finite number"),
        ({"mean": float("nan")}, "mean is nan, expected a finite number"),
        ({"mean": -(10**400)}, "expected a finite number"),
        ({"std": float("inf")}, "std is inf, expected a finite number above 0"),
        ({"std": 0}, "std is 0, expected a finite number above 0"),
        ({"std": -1.5}, "std is -1.5, expected a finite number above 0"),
        ({"sample_rate": 16_000.5}, "sample_rate is 16000.5, expected a whole number of at least 1"),
        ({"sample_rate": 0}, "sample_rate is 0, expected a whole number of at least 1"),
        ({"num_mels": 2}, "num_mels is 2, expected a whole number of at least 3"),
    ],
)
def test_reading_what_are_no_statistics(tmp_path, text, error):
    path = tmp_path / "s.json"
    path.write_text(text if isinstance(text, str) else json.dumps({**GOOD, **text}))
    with pytest.raises(StatsError) as info:
        read_stats(path)
    assert str(info.value).startswith(f"{path}: ")
    assert error in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["mean", "std", "sample_rate", "num_mels"])
def test_reading_statistics_that_lack_something(tmp_path, name):
    (tmp_path / "s.json").write_text(json.dumps({key: value for key, value in GOOD.items() if key != name}))
    with pytest.raises(StatsError, match=rf"s\.json: lacks {name}$"):
        read_stats(tmp_path / "s.json")


def test_reading_statistics(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(GOOD))
    assert read_stats(str(tmp_path / "s.json")).std == 2.0
    with pytest.raises(FileNotFoundError):
        read_stats(tmp_path / "nowhere.json")
    (tmp_path / "s.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(StatsError, match=r"s\.json: no JSON"):
        read_stats(tmp_path / "s.json")


def _double(clips: range) -> list[int]:
    return [2 * clip for clip in clips]


def _die(clips: range) -> None:
    if clips.start:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_mapping_keeps_the_order(workers):
    threads = torch.get_num_threads()
    done = list(map_clips(_double, 11, what="clips", chunk=3, workers=workers))
    assert done == [[0, 2, 4], [6, 8, 10], [12, 14, 16], [18, 20]]
    assert torch.get_num_threads() == threads


def test_a_process_that_is_killed_while_nobody_waits_for_it(monkeypatch):
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as if no loader had had processes yet
    before = set(multiprocessing.active_children())
    done = map_clips(_double, 1_000, what="clips", chunk=1, workers=2)
    next(done)
    time.sleep(0.2)  # both have done what they were asked for
    process = (set(multiprocessing.active_children()) - before).pop()
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.3)  # PyTorch's handler would raise here
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=rf"^process {process.pid} exited unexpectedly; a process that needs"):
        list(done)
    assert time.monotonic() - begin < 4  # before the loader would see it


def test_a_process_that_is_killed():
    with pytest.raises(WorkerError, match=r"exited unexpectedly; a process that needs more memory than there is"):
        list(map_clips(_die, 8, what="clips", chunk=2, workers=1))

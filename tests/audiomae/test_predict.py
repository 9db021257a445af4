"""The predict command: its probabilities are the model's, people and programs read them, and bad files are named."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from audiomae import AudioClassifier, AudioClassifierConfig, AudioMAE, AudioMAEConfig
from audiomae.checkpoints import load_classifier, save_weights
from audiomae.data import read_waveform
from audiomae.predict import main
from audiomae.windows import Windows

RATE = 16_000
SMALL = {"spec_size": (48, 128), "embed_dim": 32, "depth": 2, "num_heads": 2}
LABELS = ("Dog", "Cat", "Rain, [bold]heavy[/bold]", "Café", "Speech", "Car")
CONFIG = AudioClassifierConfig(**SMALL, num_classes=6, labels=LABELS)
WINDOWS = Windows.of(CONFIG)


def save_model(path: Path, config: AudioClassifierConfig = CONFIG) -> str:
    torch.manual_seed(0)
    model = AudioClassifier(config)
    nn.init.normal_(model.head.weight)
    save_weights(path, model)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "classifier.safetensors")


def write_noise(path: Path, samples: int, *, seed: int = 0, rate: int = RATE, channels: int = 1) -> str:
    noise = np.random.default_rng(seed).standard_normal((samples, channels))
    noise *= np.linspace(0.01, 0.2, samples)[:, None]  # windows differ
    soundfile.write(path, noise, rate)
    return str(path)


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main(["--workers", "0", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict]:
    assert run("--json", *arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@torch.no_grad()
def probabilities(checkpoint: str, waveform: Tensor) -> Tensor:
    """Probabilities ``(classes,)`` of a waveform that fits the model's input."""
    model = load_classifier(checkpoint).eval()
    return model.scores(model(model.config.front_end()(waveform[None], 48)))[0]


def assert_told(told: list[dict], expected: Tensor, labels: tuple[str, ...] = LABELS) -> None:
    """Check that the classes of the highest probabilities are told of, in their order."""
    values, order = expected.sort(descending=True)
    assert [guess["index"] for guess in told] == order[: len(told)].tolist()
    assert [guess["label"] for guess in told] == [labels[index] for index in order[: len(told)]]
    found = torch.tensor([guess["probability"] for guess in told])
    torch.testing.assert_close(found, values[: len(told)], rtol=1e-4, atol=1e-5)


# Probabilities


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_short_file_gets_the_model_s_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], activation: str
) -> None:
    checkpoint = save_model(tmp_path / "c.safetensors", replace(CONFIG, activation=activation))
    for samples in (1, 310, 5_000, WINDOWS.samples):
        path = write_noise(tmp_path / "clip.wav", samples)
        (line,) = run_json(capsys, path, "--checkpoint", checkpoint, "--top", "9")
        assert line.keys() == {"path", "start", "seconds", "top"}
        assert (line["path"], line["start"], line["seconds"]) == (path, 0, samples / RATE)
        waveform = read_waveform(path, RATE)
        expected = probabilities(checkpoint, nn.functional.pad(waveform, (0, max(0, 400 - samples))))
        assert len(line["top"]) == 6
        assert_told(line["top"], expected)
        if activation == "softmax":
            assert sum(guess["probability"] for guess in line["top"]) == pytest.approx(1, abs=1e-5)


def test_a_long_file_gets_the_mean_of_its_windows(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = 2 * WINDOWS.hop + 3_000
    path = write_noise(tmp_path / "long.wav", samples)
    (line,) = run_json(capsys, path, "--checkpoint", checkpoint, "--top", "3", "--timeline")
    waveform = read_waveform(path, RATE)
    parts = [waveform[k * WINDOWS.hop :][: WINDOWS.samples] for k in range(3)]
    scores = torch.stack([probabilities(checkpoint, part) for part in parts])
    weights = torch.tensor([len(part) for part in parts])
    assert weights.tolist() == [WINDOWS.samples, WINDOWS.samples, 3_000]
    assert_told(line["top"], (scores * weights[:, None]).sum(dim=0) / weights.sum())
    assert len(line["top"]) == 3
    starts = [part["start"] for part in line["timeline"]]
    assert starts == [0, WINDOWS.hop / RATE, 2 * WINDOWS.hop / RATE]
    assert [part["end"] for part in line["timeline"]] == [*starts[1:], samples / RATE]
    for part, expected in zip(line["timeline"], scores, strict=True):
        assert_told(part["top"], expected)


@pytest.mark.parametrize("batch_size", ["1", "3", "50"])
def test_files_share_batches_and_keep_their_order(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_size: str
) -> None:
    lengths = [5_000, 3 * WINDOWS.hop, 400, 9_000]
    paths = [write_noise(tmp_path / f"{number}.wav", samples, seed=number) for number, samples in enumerate(lengths)]
    alone = [run_json(capsys, path, "--checkpoint", checkpoint, "--timeline")[0] for path in paths]
    together = run_json(capsys, *paths, "--checkpoint", checkpoint, "--timeline", "--batch-size", batch_size)
    assert [line["path"] for line in together] == paths
    for found, expected in zip(together, alone, strict=True):
        assert len(found["timeline"]) == len(expected["timeline"])
        for guesses, same in zip(found["top"], expected["top"], strict=True):
            assert guesses["index"] == same["index"]
            assert guesses["probability"] == pytest.approx(same["probability"], abs=1e-5)


def test_folders_manifests_rates_and_channels(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    stereo = write_noise(tmp_path / "folder" / "stereo.flac", 20_000, rate=44_100, channels=2)
    (tmp_path / "clips.csv").write_text("path,start,duration\nfolder/stereo.flac,0.25,0.2\n")
    whole, part = run_json(capsys, tmp_path / "folder", tmp_path / "clips.csv", "--checkpoint", checkpoint)
    waveform = read_waveform(stereo, RATE)
    assert (whole["path"], part["path"]) == (stereo, stereo)
    assert (whole["start"], part["start"], part["seconds"]) == (0, 0.25, 0.2)
    assert_told(whole["top"], probabilities(checkpoint, waveform))
    assert_told(part["top"], probabilities(checkpoint, waveform[4_000:7_200]))


# For people


def test_people_read_names_shares_and_bars(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_noise(tmp_path / "clip.wav", 5_000)
    (line,) = run_json(capsys, path, "--checkpoint", checkpoint, "--top", "6")
    assert run(path, "--checkpoint", checkpoint, "--top", "6") == 0
    title, *rows = capsys.readouterr().out.rstrip().splitlines()
    assert title == f"{path}, 0.31 s"
    assert len(rows) == 6
    for row, guess in zip(rows, line["top"], strict=True):
        percent, bar, label = re.fullmatch(r" +([\d.]+) % {2}([█▉▊▋▌▍▎▏▐▕ ]*)  (\S.*?) *", row).groups()
        assert float(percent) == pytest.approx(100 * guess["probability"], abs=0.051)
        assert len(bar) == 24
        assert abs(len(bar.rstrip()) - 24 * guess["probability"]) <= 1
        assert label == guess["label"]


def test_timeline_has_a_line_a_window(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_noise(tmp_path / "clip.wav", 70 * RATE)
    (tmp_path / "clips.csv").write_text("path,start\nclip.wav,61.5\n")
    assert run(tmp_path / "clips.csv", "--checkpoint", checkpoint, "--timeline", "--top", "2") == 0
    part = capsys.readouterr().out
    assert part.startswith(f"{path}, 8.50 s from 1:01.50 on\n")
    assert run(path, "--checkpoint", checkpoint, "--timeline", "--top", "2") == 0
    lines = re.findall(
        r"^  (\d+:[\d.]+) - (\d+:[\d.]+)  (\S.*) (\d+) %, (\S.*) (\d+) %$", capsys.readouterr().out, re.M
    )
    assert len(lines) == WINDOWS.num_windows(70 * RATE)
    assert [line[:2] for line in lines[:2]] == [("0:00.00", "0:00.48"), ("0:00.48", "0:00.96")]
    assert lines[125][:2] == ("1:00.00", "1:00.48")
    assert lines[-1][1] == "1:10.00"
    for _, _, first, percent, second, lower in lines:
        assert {first, second} <= set(LABELS)
        assert int(percent) >= int(lower)


# Labels


def test_labels_come_from_a_file_where_the_checkpoint_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_model(tmp_path / "c.safetensors", replace(CONFIG, labels=()))
    path = write_noise(tmp_path / "clip.wav", 5_000)
    assert run(path, "--checkpoint", checkpoint) == 0
    out, err = capsys.readouterr()
    assert len(re.findall(r"class \d\b", out)) == 5
    assert err == (
        f"audiomae.predict: {checkpoint} does not name its classes: --labels FILE does, for AudioSet its "
        "class_labels_indices.csv\n"
    )
    (line,) = run_json(capsys, path, "--checkpoint", checkpoint)
    assert {guess["label"] for guess in line["top"]} == {None}
    names = tmp_path / "class_labels_indices.csv"
    rows = [f'{index},/m/{index},"Sound {index}, loud"' for index in range(6)]
    names.write_text("\n".join(["index,mid,display_name", *rows]))
    assert run("--json", path, "--checkpoint", checkpoint, "--labels", names) == 0
    out, err = capsys.readouterr()
    assert err == ""
    expected = probabilities(checkpoint, read_waveform(path, RATE))
    assert_told(json.loads(out)["top"], expected, tuple(f"Sound {index}, loud" for index in range(6)))


# What is wrong


def test_bad_files_are_named_and_the_others_told_of(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [write_noise(tmp_path / f"{number}.wav", 9_000, seed=number) for number in range(2)]
    (tmp_path / "text.wav").write_text("this is no sound")
    missing = tmp_path / "missing.wav"
    files = (good[0], tmp_path / "text.wav", missing, good[1])
    assert run("--json", *files, "--checkpoint", checkpoint) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["path"] for line in out.splitlines()] == good
    first, second, last = err.splitlines()
    assert first.startswith(f"audiomae.predict: error: {tmp_path / 'text.wav'}: cannot be read as audio")
    assert second == f"audiomae.predict: error: {missing}: No such file or directory"
    assert last == "audiomae.predict: 2 of 4 clips could not be read"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top", "0"], "top is 0, expected at least 1"),
        (["--batch-size", "0"], "batch_size is 0, expected at least 1"),
        (["--labels", "five.txt"], "five.txt names 5 classes, {checkpoint} has 6"),
        (["--labels", "missing.txt"], "no such label file: missing.txt"),
        (["--checkpoint", "missing.pth"], "no such checkpoint: missing.pth"),
        (["--checkpoint", "mae.safetensors"], "mae.safetensors has no fc_norm.weight, expected a classifier"),
        (["--checkpoint", "rgb.safetensors"], "rgb.safetensors is a model of 3 channels, expected 1: files are read"),
        (["--device", "cuda"], "device is cuda, but PyTorch sees no GPU here"),
    ],
)
def test_wrong_settings_end_it_with_one_line(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "five.txt").write_text("a\nb\nc\nd\ne\n")
    save_weights(tmp_path / "mae.safetensors", AudioMAE(AudioMAEConfig(**SMALL, decoder_dim=32, window=(3, 4))))
    save_model(tmp_path / "rgb.safetensors", replace(CONFIG, in_channels=3))
    assert run("a.wav", "--checkpoint", checkpoint, *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"audiomae.predict: error: {message.format(checkpoint=checkpoint)}")
    assert err.count("\n") == 1


def test_no_files(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--checkpoint", checkpoint) == 2
    expected = "audiomae.predict: error: no files given, expected sound files, folders or manifests\n"
    assert capsys.readouterr().err == expected

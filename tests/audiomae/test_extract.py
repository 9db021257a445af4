"""The extract command: its files hold what the model says of each clip, and bad clips and settings are told of."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import audiomae.data.windowed
from audiomae import AudioClassifier, AudioClassifierConfig, AudioMAE, AudioMAEConfig
from audiomae.checkpoints import load_classifier, load_model, save_weights
from audiomae.data import read_waveform
from audiomae.embedding import Embedding, WindowEmbedder
from audiomae.extract import NumpyWriter, main
from audiomae.windows import Windows

RATE = 16_000
SMALL = {"spec_size": (48, 128), "embed_dim": 32, "depth": 2, "num_heads": 2}
CONFIG = AudioMAEConfig(**SMALL, decoder_dim=16, decoder_depth=2, decoder_heads=2, window=(3, 4), shift=(1, 0))
WINDOWS = Windows.of(CONFIG)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "weights.safetensors"
    torch.manual_seed(0)
    save_weights(path, AudioMAE(CONFIG))
    return str(path)


def write_noise(path: Path, samples: int, *, seed: int = 0, rate: int = RATE, channels: int = 1) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.1 * np.random.default_rng(seed).standard_normal((samples, channels)).cumsum(axis=0)
    soundfile.write(path, np.diff(noise, axis=0, prepend=0), rate)
    return str(path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Clips of less than a frame to several windows, of several rates and channels."""
    folder = tmp_path_factory.mktemp("clips")
    lengths = [310, 4_000, 8_000, 2 * WINDOWS.hop + WINDOWS.half_patch - 1, 2 * WINDOWS.hop + WINDOWS.half_patch]
    paths = [write_noise(folder / f"{number}.wav", samples, seed=number) for number, samples in enumerate(lengths)]
    paths.append(write_noise(folder / "stereo.flac", 100_000, seed=7, rate=44_100, channels=2))
    paths.append(write_noise(folder / "low.wav", 20_000, seed=8, rate=8_000))
    return paths


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def expected_embeddings(checkpoint: str, paths: list[str], layer: int | None = None) -> list[Embedding]:
    model = load_model(checkpoint)
    return [model.embed(read_waveform(path, RATE), RATE, layer=layer) for path in paths]


def assert_rows_close(found: np.ndarray, expected: list[Tensor]) -> None:
    torch.testing.assert_close(torch.from_numpy(found), torch.stack(expected), **TOLERANCE)


# Outputs


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (3, 2), (100, 0)])
def test_numpy_file_holds_what_the_model_says_of_each_clip(
    checkpoint: str, clips: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], batch_size: int, workers: int
) -> None:
    out = tmp_path / "new" / "embeddings.npz"
    flags = ("--batch-size", str(batch_size), "--workers", str(workers))
    assert run(*clips, "--checkpoint", checkpoint, "--out", out, *flags) == 0
    with np.load(out) as content:
        assert content["paths"].tolist() == clips
        assert content["starts"].tolist() == [0.0] * len(clips)
        seconds = [soundfile.info(path).duration for path in clips]
        np.testing.assert_allclose(content["seconds"], seconds, atol=1 / RATE)
        assert content["clip"].dtype == np.float32
        assert_rows_close(content["clip"], [embedding.clip for embedding in expected_embeddings(checkpoint, clips)])
        assert len(content["skipped"]) == len(content["skipped_reasons"]) == 0
        assert "frames" not in content
    printed, errors = capfd.readouterr()
    assert printed == f"7 clips of {sum(seconds):.1f} s in all, 32 numbers each: {out}\n"
    assert errors == ""
    assert [path.name for path in out.parent.iterdir()] == ["embeddings.npz"]


def test_frames_of_all_clips_follow_each_other(checkpoint: str, clips: list[str], tmp_path: Path) -> None:
    out = tmp_path / "frames.npz"
    assert run(*clips, "--checkpoint", checkpoint, "--out", out, "--frames", "--layer", "1", "--workers", "0") == 0
    content = np.load(out)
    expected = expected_embeddings(checkpoint, clips, layer=1)
    assert_rows_close(content["clip"], [embedding.clip for embedding in expected])
    assert content["offsets"].tolist() == np.cumsum([0, *(len(embedding.frames) for embedding in expected)]).tolist()
    assert len(content["frames"]) == len(content["times"]) == content["offsets"][-1]
    for clip, embedding in enumerate(expected):
        own = slice(content["offsets"][clip], content["offsets"][clip + 1])
        torch.testing.assert_close(torch.from_numpy(content["frames"][own]), embedding.frames, **TOLERANCE)
        torch.testing.assert_close(torch.from_numpy(content["times"][own]), embedding.times)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("row_group", [1, 64 << 20])
def test_parquet_file_has_a_row_a_clip(
    checkpoint: str, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: bool, row_group: int
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("audiomae.extract.ROW_GROUP", row_group)
    flags = [*clips, "--checkpoint", checkpoint, "--workers", "0", *(["--frames"] if frames else [])]
    assert run(*flags, "--out", tmp_path / "x.npz") == run(*flags, "--out", tmp_path / "x.parquet") == 0
    content, table = np.load(tmp_path / "x.npz"), parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["path", "start", "seconds", "clip", *(["frames", "times"] if frames else [])]
    assert table["path"].to_pylist() == clips
    assert table["start"].to_pylist() == [0.0] * len(clips)
    assert table["seconds"].to_pylist() == content["seconds"].tolist()
    np.testing.assert_array_equal(np.array(table["clip"].to_pylist(), np.float32), content["clip"])
    if frames:
        rows = zip(table["frames"].to_pylist(), table["times"].to_pylist(), strict=True)
        for clip, (embeddings, times) in enumerate(rows):
            own = slice(content["offsets"][clip], content["offsets"][clip + 1])
            np.testing.assert_array_equal(np.array(embeddings, np.float32), content["frames"][own])
            assert times == content["times"][own].tolist()
    metadata = parquet.read_metadata(tmp_path / "x.parquet").metadata
    assert json.loads(metadata[b"skipped"]) == json.loads(metadata[b"skipped_reasons"]) == []


def test_fine_tuned_model_gives_the_stream_that_it_pools(clips: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_weights(tmp_path / "classifier.safetensors", AudioClassifier(AudioClassifierConfig(**SMALL, num_classes=3)))
    assert run(*clips[:4], "--checkpoint", tmp_path / "classifier.safetensors", "--out", tmp_path / "x.npz") == 0
    model = load_classifier(tmp_path / "classifier.safetensors")
    expected = [model.embed(read_waveform(path, RATE), RATE).clip for path in clips[:4]]
    assert_rows_close(np.load(tmp_path / "x.npz")["clip"], expected)


def test_folders_and_manifests(checkpoint: str, tmp_path: Path) -> None:
    long = write_noise(tmp_path / "folder" / "b.wav", 60_000)
    write_noise(tmp_path / "folder" / "inner" / "a.flac", 5_000, seed=1)
    (tmp_path / "clips.csv").write_text(
        "file,label,start,duration\nfolder/b.wav,x,,\nfolder/b.wav,x,1.25,\nfolder/b.wav,y,0.5,0.9\n"
    )
    arguments = (tmp_path / "folder", tmp_path / "clips.csv", long)
    assert run(*arguments, "--checkpoint", checkpoint, "--out", tmp_path / "x.npz", "--frames") == 0
    content = np.load(tmp_path / "x.npz")
    assert content["paths"].tolist() == [long, str(tmp_path / "folder" / "inner" / "a.flac"), long, long, long, long]
    assert content["starts"].tolist() == [0, 0, 0, 1.25, 0.5, 0]
    np.testing.assert_allclose(content["seconds"], [3.75, 0.3125, 3.75, 2.5, 0.9, 3.75])
    model, waveform = load_model(checkpoint), read_waveform(long, RATE)
    for clip, part in [(2, waveform), (3, waveform[20_000:]), (4, waveform[8_000:22_400])]:
        embedding = model.embed(part, RATE)
        own = slice(content["offsets"][clip], content["offsets"][clip + 1])
        torch.testing.assert_close(torch.from_numpy(content["frames"][own]), embedding.frames, **TOLERANCE)


def test_a_name_that_is_no_text(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    try:
        Path(write_noise(tmp_path / "clip.wav", 5_000)).rename(path)
    except OSError:
        pytest.skip("the file system takes only text")
    for name in ("x.npz", "x.parquet"):
        assert run(path, "--checkpoint", checkpoint, "--out", tmp_path / name) == 0
    assert np.load(tmp_path / "x.npz")["paths"].tolist() == [path]
    from pyarrow.parquet import read_table

    assert read_table(tmp_path / "x.parquet")["path"].to_pylist() == [str(tmp_path / r"caf\udce9.wav")]


def test_a_long_file_is_read_window_by_window(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_noise(tmp_path / "long.flac", 400_000, rate=22_050)
    asked = []

    def read(path: str, rate: int, start: float, duration: float) -> Tensor:
        asked.append((start, duration))
        assert duration <= (WINDOWS.hop + WINDOWS.half_patch) / RATE
        return read_waveform(path, rate, start, duration)

    monkeypatch.setattr(audiomae.data.windowed, "read_waveform", read)
    assert run(path, "--checkpoint", checkpoint, "--out", tmp_path / "x.npz", "--frames", "--workers", "0") == 0
    assert [round(start * RATE) for start, _ in asked] == list(range(0, len(asked) * WINDOWS.hop, WINDOWS.hop))
    assert len(asked) == WINDOWS.num_windows(-(-400_000 * RATE // 22_050)) == 38
    (expected,) = expected_embeddings(checkpoint, [path])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "x.npz")["frames"]), expected.frames, **TOLERANCE)


# Clips that cannot be read


@pytest.fixture
def bad_clips(clips: list[str], tmp_path: Path) -> dict[str, str]:
    """Files and what is wrong with them; the last one only after some windows."""
    (tmp_path / "text.wav").write_text("this is no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    samples = np.zeros(50_000, np.float32)
    samples[45_000] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    reasons = {
        "missing.wav": "No such file or directory",
        "text.wav": "cannot be read as audio",
        "empty.wav": "holds no samples",
        "nan.wav": "holds samples that are not finite",
    }
    return {str(tmp_path / name): reason for name, reason in reasons.items()}


@pytest.mark.parametrize("name", ["x.npz", "x.parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_clips_are_named_and_the_others_embedded(
    checkpoint: str,
    clips: list[str],
    bad_clips: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    workers: int,
) -> None:
    mixed = [*list(bad_clips)[:2], *clips[:3], *list(bad_clips)[2:], *clips[3:]]
    flags = ("--out", tmp_path / name, "--workers", str(workers), "--batch-size", "3")
    assert run(*mixed, "--checkpoint", checkpoint, *flags) == 1
    if name == "x.npz":
        content = np.load(tmp_path / name)
        paths, found = content["paths"].tolist(), content["clip"]
        skipped, reasons = content["skipped"].tolist(), content["skipped_reasons"].tolist()
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table, metadata = parquet.read_table(tmp_path / name), parquet.read_metadata(tmp_path / name).metadata
        paths, found = table["path"].to_pylist(), np.array(table["clip"].to_pylist(), np.float32)
        skipped, reasons = json.loads(metadata[b"skipped"]), json.loads(metadata[b"skipped_reasons"])
    assert paths == clips
    assert_rows_close(found, [embedding.clip for embedding in expected_embeddings(checkpoint, clips)])
    assert skipped == list(bad_clips)
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 5
    for (path, reason), told, line in zip(bad_clips.items(), reasons, errors[:4], strict=True):
        assert told.startswith(f"{path}: {reason}")
        assert line == f"audiomae.extract: error: {told}"
    assert errors[4] == "audiomae.extract: 4 of 11 clips could not be read"


def test_a_part_beyond_the_end_is_a_bad_clip(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_noise(tmp_path / "a.wav", 8_000)
    (tmp_path / "clips.csv").write_text("path,start,duration\na.wav,0.1,9\na.wav,0.7,\n")
    arguments = (tmp_path / "clips.csv", "--checkpoint", checkpoint, "--out", tmp_path / "x.npz", "--workers", "0")
    assert run(*arguments) == 1
    content = np.load(tmp_path / "x.npz")
    np.testing.assert_allclose(content["seconds"], [0.4])
    assert content["skipped"].tolist() == [path]
    assert f"error: start of 0.7 s lies outside {path}, which lasts 0.5 s" in capsys.readouterr().err


def test_without_any_clip_nothing_is_written(
    checkpoint: str, bad_clips: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.npz"
    out.write_text("earlier")
    assert run(*bad_clips, "--checkpoint", checkpoint, "--out", out) == 2
    assert out.read_text() == "earlier"
    assert not list(tmp_path.glob("*.tmp"))
    end = capsys.readouterr().err.splitlines()[-1]
    assert end == f"audiomae.extract: error: none of the 4 clips could be read, so {out} is not written"


def test_output_that_cannot_be_written_leaves_the_earlier_one(
    checkpoint: str,
    clips: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.npz"
    out.write_text("earlier")

    def fail(self: NumpyWriter, skipped: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NumpyWriter, "finish", fail)
    assert run(*clips[:2], "--checkpoint", checkpoint, "--out", out) == 2
    assert out.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    assert f"audiomae.extract: error: no space is left to write {out} " in capsys.readouterr().err


# Settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "x.csv"], "out is x.csv, expected a name that ends in .npz or .parquet"),
        (["--out", "folder.npz"], "out is folder.npz, which is a folder: expected a file"),
        (["--layer", "3"], "layer is 3, expected 1 to 2, or -2 to -1 from the last one back"),
        (["--layer", "0"], "layer is 0, expected 1 to 2"),
        (["--batch-size", "0"], "batch_size is 0, expected at least 1"),
        (["--checkpoint", "missing.safetensors"], "no such checkpoint: missing.safetensors"),
        (["--device", "cuda"], "device is cuda, but PyTorch sees no GPU here"),
    ],
)
def test_wrong_settings_end_it_with_one_line(
    checkpoint: str,
    clips: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "folder.npz").mkdir()
    assert run(clips[0], "--checkpoint", checkpoint, "--out", "x.npz", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"audiomae.extract: error: {message}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.npz"]


def test_sources_are_checked(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    extract = partial(run, "--checkpoint", checkpoint, "--out", tmp_path / "x.npz")
    for sources, message in [
        ([], "no files given, expected sound files, folders or manifests"),
        ([tmp_path / "missing.csv"], f"no such file or folder: {tmp_path / 'missing.csv'}"),
        ([tmp_path / "empty"], f"{tmp_path / 'empty'}: no audio files in it or below"),
    ]:
        assert extract(*sources) == 2
        assert capsys.readouterr().err.startswith(f"audiomae.extract: error: {message}")
    monkeypatch.setattr("audiomae.extract.find_spec", lambda name: None)
    out = tmp_path / "x.parquet"
    assert run("a.wav", "--checkpoint", checkpoint, "--out", out) == 2
    expected = f"out is {out}, which takes pyarrow: pip install 'audiomae[parquet]', or write an .npz"
    assert capsys.readouterr().err == f"audiomae.extract: error: {expected}\n"


def test_encoder_of_several_channels_is_refused(
    clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(tmp_path / "rgb.safetensors", AudioMAE(replace(CONFIG, in_channels=3)))
    assert run(clips[0], "--checkpoint", tmp_path / "rgb.safetensors", "--out", tmp_path / "x.npz") == 2
    assert "error: the encoder hears 3 channels, expected 1" in capsys.readouterr().err


def test_autocast_follows_the_precision(
    checkpoint: str, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, seen = WindowEmbedder.__call__, []

    def spy(self: WindowEmbedder, windows: Tensor, lengths: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return call(self, windows, lengths)

    monkeypatch.setattr(WindowEmbedder, "__call__", spy)
    for precision in ("auto", "bf16"):
        flags = ("--device", "cpu", "--precision", precision)
        assert run(clips[1], "--checkpoint", checkpoint, "--out", tmp_path / "x.npz", *flags) == 0
    assert seen == [False, torch.bfloat16]

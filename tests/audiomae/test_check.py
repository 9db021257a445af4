import json
import os
import re
from pathlib import Path

import pytest
import soundfile as sf

from audiomae.data import ManifestError
from audiomae.data.check import main
from audiomae.data.clips import ClipError
from audiomae.data.headers import read_header
from audiomae.data.sets import DATA_SETS, ESC50_FOLDS, read_task

from .miniatures import (
    make_audioset,
    make_class_folders,
    make_esc50,
    make_manifest,
    make_speech_commands,
    make_voxceleb1,
)


def check(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as info:
        main([str(argument) for argument in arguments])
    assert isinstance(info.value.code, int)
    return info.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("esc50", r"no meta/esc50\.csv, expected the unpacked archive of ESC-50 \(karolpiczak/ESC-50\)"),
        ("speech-commands-v1", r"expected the unpacked archive speech_commands_v0\.01\.tar\.gz"),
        ("speech-commands-v2", r"expected the unpacked archive speech_commands_v0\.02\.tar\.gz"),
        ("voxceleb1", r"no iden_split\.txt, expected it beside wav/, from VoxCeleb1's page \(identification\)"),
        (
            "audioset",
            r"neither AudioSet's balanced_train_segments\.csv nor a manifest whole_train_data\.json or train_all",
        ),
        ("manifest", "no audio files below it, expected a folder for each class"),
    ],
)
def test_a_folder_without_the_data_set(tmp_path, capsys, name, reason):
    with pytest.raises(ManifestError, match=reason):
        read_task(name, tmp_path)
    code, out, err = check(capsys, name, tmp_path)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"audiomae\.data\.check: error: {re.escape(str(tmp_path))}: .*{reason}.*\n", err)


def test_checking_all_that_is_there(tmp_path, capsys):
    train = make_manifest(tmp_path, seconds=0.5)
    code, out, err = check(capsys, "manifest", train, "--valid", tmp_path / "valid.csv", "--open")
    assert (code, err) == (0, "")
    assert out.startswith(f"own lists in {train}\n")
    assert "sound: 0.001667 h, clips of 0.5 to 0.5 s: 12 of 16,000 Hz" in out
    assert out.endswith("\ncomplete\n")
    assert check(capsys, "demo")[0] == 0


def test_checking_a_complete_data_set(tmp_path, capsys):
    root = make_esc50(tmp_path, classes=["dog"], folds=[1], seconds=0.01)
    (sound,) = (root / "audio").iterdir()
    rows = [(f"{fold}-{i}.wav", fold, i % 50, f"class_{i % 50}") for fold in ESC50_FOLDS for i in range(400)]
    for name, *_ in rows:
        os.link(sound, root / "audio" / name)
    lines = [",".join(map(str, row)) for row in rows]
    (root / "meta" / "esc50.csv").write_text("\n".join(["filename,fold,target,category", *lines]) + "\n")
    code, out, _ = check(capsys, "esc50", root)
    assert code == 0, out
    assert len(read_task("esc50", root, fold=5).train) == 1_600


def test_checking_what_is_missing(tmp_path, capsys):
    root = make_esc50(tmp_path / "esc", seconds=0.2)
    files = sorted((root / "audio").iterdir())
    for path in (root / "audio").glob("3-*.wav"):
        path.unlink()
    files[0].write_bytes(b"no sound")
    sf.write(files[1], [], 44_100)
    report = tmp_path / "report.json"
    code, out, _ = check(capsys, "esc50", root, "--open", "--json", report, "--names", "2")
    assert code == 1
    missing = sorted(path.name for path in files if path.name.startswith("3-"))
    assert f"\nfold 3: missing: {missing[0]}, {missing[1]} and 2 more\n" in out
    assert "\nfold 3: 4 clips, the complete data set has 400\n" in out
    assert "\n4 classes, the complete data set has 50\n" in out
    assert f"{files[0]} (cannot be read as audio (Format not recognised)), {files[1]} (holds no samples)\n" in out
    assert out.endswith("\nnot complete\n")
    found = json.loads(report.read_text())
    assert (found["data_set"], found["complete"], found["classes"], found["published_classes"]) == (
        "esc50",
        False,
        4,
        50,
    )
    parts = {part["name"]: part for part in found["parts"]}
    assert (parts["fold 3"]["listed"], parts["fold 3"]["at_hand"]) == (4, 0)
    assert sorted(parts["fold 3"]["missing"]) == missing
    assert parts["fold 1"]["unreadable"] == {
        str(files[0]): "cannot be read as audio (Format not recognised)",
        str(files[1]): "holds no samples",
    }
    assert found["sound"]["sample_rates"] == {"44100": 14}
    assert found["sound"]["shortest"] == found["sound"]["longest"] == pytest.approx(0.2)


def test_checking_lists_that_name_missing_files(tmp_path, capsys):
    audioset_json = make_audioset(tmp_path / "audioset", layout="json", seconds=0.01)
    source = json.loads((audioset_json / "train.json").read_text())
    source["data"].append({"wav": "gone.wav", "labels": "/m/09x0r"})
    (tmp_path / "train.json").write_text(json.dumps(source))
    arguments = ["--labels", audioset_json / "class_labels_indices.csv", "--test", audioset_json / "eval_19k.json"]
    code, out, _ = check(capsys, "audioset-20k", tmp_path / "train.json", *arguments)
    assert code == 1
    assert f"balanced: missing: {tmp_path / 'gone.wav'}\n" in out
    assert re.search(r"balanced +- +7 +6 +1 +- +5", out)
    (tmp_path / "a.csv").write_text("path,label\ngone.wav,a\nlost.wav,b\n")
    code, out, _ = check(capsys, "manifest", tmp_path / "a.csv", "--open")
    assert code == 1
    assert "no clips of 2 of 2 classes: a, b\n" in out


def test_checking_labels_and_parts_of_files(tmp_path, capsys):
    make_manifest(tmp_path, seconds=0.5)
    rows = ["path,label,start,duration", "train/bell_0.wav,bell,0.1,0.2", "train/horn_0.wav,horn,0.75,0.1"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "labels.txt").write_text("bell\nhorns\n")
    code, out, _ = check(capsys, "manifest", tmp_path / "a.csv", "--labels", tmp_path / "labels.txt", "--open")
    assert code == 1
    assert "horn_0.wav (lasts 0.5 s, expected a part of it from 0.75 s on)\n" in out
    assert "clips of 0.2 to 0.2 s: 1 of 16,000 Hz" in out
    assert "train: clip 1 (" in out
    assert "label 'horn' is not in" in out
    assert "no clips of" not in out


@pytest.mark.parametrize(
    ("name", "make", "part"),
    [
        ("speech-commands-v1", lambda root: make_speech_commands(root, 1, train=1, seconds=0.01), "official test"),
        ("speech-commands-v2", lambda root: make_speech_commands(root, 2, train=1, seconds=0.01), "test"),
        ("audioset", make_audioset, "unbalanced"),
        ("voxceleb1", make_voxceleb1, "valid"),
    ],
)
def test_checking_a_miniature(tmp_path, capsys, name, make, part):
    code, out, _ = check(capsys, name, make(tmp_path), "--open")
    assert code == 1
    assert re.search(rf"^{part}: \d+ clips, the complete data set has [\d,]+$", out, re.MULTILINE)
    for fault in ("missing:", "unreadable:", "label ", "no clips of"):
        assert fault not in out


def test_headers(tmp_path):
    sf.write(tmp_path / "a.wav", [0.0] * 100, 8_000)
    assert read_header(str(tmp_path / "a.wav")) == (0.0125, 8_000)
    (tmp_path / "a.raw").touch()
    with pytest.raises(ClipError, match=r"a\.raw: raw audio has no header and cannot be read"):
        read_header(str(tmp_path / "a.raw"))
    with pytest.raises(ClipError, match=r"b\.wav: No such file or directory"):
        read_header(str(tmp_path / "b.wav"))
    sf.write(tmp_path / "c.wav", [0.0], 2_000_000)
    with pytest.raises(ClipError, match=r"c\.wav: sample rate of 2000000 Hz, at most 1000000 Hz can be read"):
        read_header(str(tmp_path / "c.wav"))
    os.mkfifo(tmp_path / "d.wav")
    with pytest.raises(ClipError, match=r"d\.wav: is no regular file"):
        read_header(str(tmp_path / "d.wav"))


def test_checking_a_folder_with_pipes_and_folders_that_are_named_like_sounds(tmp_path, capsys):
    root = make_class_folders(tmp_path, seconds=0.5)
    os.mkfifo(root / "bell" / "pipe.wav")
    (root / "horn" / "folder.wav").mkdir()
    code, out, _ = check(capsys, "manifest", root, "--open")
    assert code == 1
    assert f"missing: {root / 'bell' / 'pipe.wav'}\n" in out
    assert "folder.wav" not in out


def test_every_data_set_is_in_the_help_and_the_docs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = check(capsys, "--help")
    assert code == 0
    docs = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    for name in DATA_SETS:
        assert name in out
        assert f"audiomae.data.check {name}" in docs

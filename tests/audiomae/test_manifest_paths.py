"""Lists that name files outside their folders: refused, unless allowed."""

import json
import os
import re
from pathlib import Path

import pytest
import soundfile as sf
import torch

from audiomae.data import ManifestError, check, read_manifest
from audiomae.data.manifests import _inside
from audiomae.data.sets import read_labelled, read_task, survey
from audiomae.data.windowed import list_clips
from audiomae.extract import ExtractConfig
from audiomae.extract import build as build_extract
from audiomae.predict import PredictConfig
from audiomae.predict import build as build_predict
from audiomae.training.distributed import Ranks

from .miniatures import make_audioset, make_esc50, make_manifest, make_speech_commands, make_voxceleb1, paths

ALLOWS = "lies outside the folder of the list; --allow-outside (allow_outside=True) allows it"
OUTSIDE = ["/etc/x.wav", "../x.wav", "a/../../x.wav", "{root}/../x.wav", "{root}er/x.wav", "../{name}er/x.wav", ".."]
INSIDE = ["x.wav", "a/../x.wav", "{root}/x.wav", "{root}/a/x.wav", "../{name}/x.wav", "..x.wav", "a/x..wav", "./x.wav"]


def write_list(folder: Path, kind: str, *clips: str) -> Path:
    """Write a list of labelled clips, in which {root} and {name} stand for its folder."""
    folder.mkdir(exist_ok=True)
    names = [clip.format(root=folder, name=folder.name) for clip in clips]
    path = folder / f"list.{kind}"
    if kind == "json":
        path.write_text(json.dumps({"data": [{"wav": name, "labels": f"/m/{i}"} for i, name in enumerate(names)]}))
    else:
        path.write_text("\n".join(["path,label", *(f"{name},{i}" for i, name in enumerate(names))]) + "\n")
    return path


@pytest.mark.parametrize(("kind", "place"), [("csv", "line 3"), ("json", r"data\[1\]")])
@pytest.mark.parametrize("clip", OUTSIDE)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, kind: str, place: str, clip: str) -> None:
    source = write_list(tmp_path / "lists", kind, "fine.wav", clip, "fine.wav")
    named = re.escape(repr(clip.format(root=tmp_path / "lists", name="lists")))
    with pytest.raises(ManifestError, match=f"^{re.escape(str(source))}: {place}: {named} {re.escape(ALLOWS)}$"):
        read_manifest(source)
    expected = os.path.join(tmp_path / "lists", clip.format(root=tmp_path / "lists", name="lists"))
    assert paths(read_manifest(source, allow_outside=True))[1] == expected


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_paths_inside_the_folder_are_taken_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = write_list(tmp_path / "lists", kind, *INSIDE)
    expected = [os.path.join(tmp_path / "lists", c.format(root=tmp_path / "lists", name="lists")) for c in INSIDE]
    assert paths(read_manifest(source)) == expected
    for there, relative in ((tmp_path, f"lists/list.{kind}"), (tmp_path / "lists", f"../lists/./list.{kind}")):
        monkeypatch.chdir(there)
        assert [os.path.abspath(path) for path in paths(read_manifest(relative))] == list(
            map(os.path.normpath, expected)
        )


def test_links_are_the_business_of_who_made_them(tmp_path: Path) -> None:
    source = write_list(tmp_path / "lists", "csv", "link/x.wav")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "lists" / "link").symlink_to(tmp_path / "elsewhere")
    assert paths(read_manifest(source)) == [str(tmp_path / "lists" / "link" / "x.wav")]
    # Through a link to the list's folder, its true path is another one.
    (tmp_path / "alias").symlink_to(tmp_path / "lists")
    write_list(tmp_path / "lists", "csv", "{root}/x.wav")
    with pytest.raises(ManifestError, match=re.escape(ALLOWS)):
        read_manifest(tmp_path / "alias" / "list.csv")


def test_the_root_of_the_file_system_holds_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/etc/x.wav", "../x.wav", "x.wav"):
        assert _inside(Path("/"))(path)
    monkeypatch.chdir("/")
    assert _inside(Path())("/etc/x.wav")


def test_a_name_of_two_lines_is_told_in_one(tmp_path: Path) -> None:
    source = write_list(tmp_path / "lists", "json", "../a\nb.wav")
    with pytest.raises(ManifestError, match=r"data\[0\]: '\.\./a\\nb\.wav' lies outside") as info:
        read_manifest(source)
    assert "\n" not in str(info.value)


# Through everything that reads lists


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A labelled list of two sounds that lie beside its folder."""
    for name in "ab":
        sf.write(tmp_path / f"{name}.wav", [0.0, 0.5] * 2_000, 16_000)
    return write_list(tmp_path / "lists", "csv", "../a.wav", "{root}/../b.wav")


def test_labelled_lists(outside: Path) -> None:
    make_manifest(outside.parent / "own", seconds=0.01)
    own = outside.parent / "own" / "train.csv"
    refused = [
        lambda **allow: read_labelled(outside, **allow),
        lambda **allow: read_task("manifest", outside, **allow),
        lambda **allow: read_task("manifest", own, valid=outside, **allow),
        lambda **allow: read_task("manifest", own, test=outside, **allow),
        lambda **allow: survey("manifest", own, test=outside, **allow),
        lambda **allow: list_clips([str(own), str(outside)], **allow),
    ]
    for read in refused:
        with pytest.raises(ManifestError, match=re.escape(ALLOWS)):
            read()
        read(allow_outside=True)
    # What is named directly need not lie anywhere.
    assert paths(list_clips(["/a.wav", "../b.wav"])) == ["/a.wav", "../b.wav"]


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_manifests_of_audioset(tmp_path: Path, part: str) -> None:
    root = make_audioset(tmp_path / "audioset", layout="json", seconds=0.01)
    lists = {name: root / file for name, file in (("train", "train.json"), ("test", "eval_19k.json"))}
    lists |= {"valid": root / "eval_19k.json"}
    (tmp_path / "lists").mkdir()
    lists[part] = lists[part].rename(tmp_path / "lists" / "moved.json")
    if part == "valid":
        lists["test"] = lists["train"]
    options = {"valid": lists["valid"], "test": lists["test"], "labels": root / "class_labels_indices.csv"}
    if part == "test":
        del options["valid"]
    with pytest.raises(ManifestError, match=rf"moved\.json: data\[0\]: .*{re.escape(ALLOWS)}"):
        read_task("audioset-20k", lists["train"], **options)
    assert len(read_task("audioset-20k", lists["train"], **options, allow_outside=True).train) == 6


def test_the_checker(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, status in (([], 2), (["--allow-outside"], 0)):
        with pytest.raises(SystemExit) as info:
            check.main(["manifest", str(outside), *flags])
        assert info.value.code == status
        assert (ALLOWS in capsys.readouterr().err) == (status == 2)


def test_commands_on_files(outside: Path, tmp_path: Path) -> None:
    files, ranks = (str(outside),), Ranks(0, 1, 1, torch.device("cpu"))
    gone = str(tmp_path / "gone.safetensors")
    for allow_outside, reason in ((False, re.escape(ALLOWS)), (True, "gone")):  # the checkpoint comes after the clips
        with pytest.raises((ValueError, OSError), match=reason):
            build_extract(ExtractConfig(files, gone, tmp_path / "x.npz", allow_outside=allow_outside), ranks)
        with pytest.raises((ValueError, OSError), match=reason):
            build_predict(PredictConfig(files, gone, allow_outside=allow_outside), ranks)


# Official lists name files below their root, and nothing else


def test_esc50_finds_no_file_elsewhere(tmp_path: Path) -> None:
    root = make_esc50(tmp_path / "esc", folds=(1, 2), seconds=0.01)
    (root / "secret.wav").touch()
    names = ["../secret.wav", str(root / "secret.wav"), "../../x.wav"]
    with (root / "meta" / "esc50.csv").open("a") as file:
        file.writelines(f"{name},1,0,dog,False,0,A\n" for name in names)
    parts = survey("esc50", root, fold=1).parts
    assert parts[0].missing == tuple(names)
    assert len(paths(parts[0].manifest)) == 4


def test_voxceleb1_finds_no_file_elsewhere(tmp_path: Path) -> None:
    root = make_voxceleb1(tmp_path / "vox", speakers=2, seconds=0.01)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.wav").touch()
    names = ["../secret/x.wav", "id10001/../x.wav"]
    with (root / "iden_split.txt").open("a") as file:
        file.writelines(f"1 {name}\n" for name in names)
    assert survey("voxceleb1", root).parts[0].missing == tuple(names)


def test_audioset_finds_no_file_elsewhere(tmp_path: Path) -> None:
    root = make_audioset(tmp_path / "audioset", seconds=0.01)
    (tmp_path / "abcdefghijk.wav").touch()
    ids = ["../abcdefghijk", str(tmp_path / "abcdefghijk")]
    with (root / "balanced_train_segments.csv").open("a") as file:
        file.writelines(f'{video}, 0.000, 10.000, "/m/09x0r"\n' for video in ids)
    assert survey("audioset-20k", root).parts[0].missing == tuple(ids)


def test_speech_commands_find_no_file_elsewhere(tmp_path: Path) -> None:
    base = make_speech_commands(tmp_path / "spc", 2, train=1, seconds=0.01) / "speech_commands_v0.02"
    (tmp_path / "x.wav").touch()
    with (base / "testing_list.txt").open("a") as file:
        file.write("yes/../../../x.wav\n")
    found = survey("speech-commands-v2", tmp_path / "spc")
    assert next(part for part in found.parts if part.name == "test").missing == ("yes/../../../x.wav",)


@pytest.mark.parametrize(
    ("name", "make", "file"),
    [
        ("esc50", make_esc50, "meta/esc50.csv"),
        ("voxceleb1", make_voxceleb1, "iden_split.txt"),
        ("audioset", make_audioset, "eval_segments.csv"),
        (
            "speech-commands-v2",
            lambda root, seconds: make_speech_commands(root, 2, train=1, seconds=seconds),
            "speech_commands_v0.02/testing_list.txt",
        ),
    ],
)
def test_official_lists_that_are_not_utf_8(tmp_path: Path, name: str, make, file: str) -> None:
    root = make(tmp_path, seconds=0.01)
    with (root / file).open("ab") as opened:
        opened.write(b"caf\xe9\n")
    with pytest.raises(ManifestError, match=rf"{re.escape(str(root / file))}: 'utf-8' codec can't decode byte 0xe9"):
        survey(name, root)

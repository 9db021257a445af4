import os
import re
from pathlib import Path

import pytest

from audiomae.data import ManifestError, read_manifest
from audiomae.data.clips import read_clip
from audiomae.data.labels import LabelError
from audiomae.data.sets import ESC50_FOLDS, read_task

from .miniatures import (
    AUDIOSET_CLASSES,
    ESC50_CLASSES,
    label_counts,
    link_copy,
    make_audioset,
    make_class_folders,
    make_esc50,
    make_manifest,
    make_voxceleb1,
    note,
    paths,
)


@pytest.fixture(scope="module")
def audioset(tmp_path_factory) -> Path:
    return make_audioset(tmp_path_factory.mktemp("audioset"))


@pytest.fixture(scope="module")
def audioset_json(tmp_path_factory) -> Path:
    return make_audioset(tmp_path_factory.mktemp("audioset_json"), layout="json")


def test_esc50(tmp_path):
    root = make_esc50(tmp_path)
    assert ESC50_FOLDS == (1, 2, 3, 4, 5)
    tested = []
    for fold in ESC50_FOLDS:
        task = read_task("esc50", root, fold=fold)
        assert task.name == "esc50"
        assert task.labels.keys == ESC50_CLASSES  # in the order of their targets, not of the alphabet
        assert task.labels.names[-1] == "door wood knock"
        assert task.valid is None
        assert label_counts(task.train) == dict.fromkeys(ESC50_CLASSES, 4)
        assert all(Path(path).name.startswith(f"{fold}-") for path in paths(task.test))
        assert not set(paths(task.train)) & set(paths(task.test))
        tested += paths(task.test)
        assert note(task, "test split") == (
            f"esc50: fold {fold} is the test split and the others train; the protocol has no validation split"
        )
        assert "clips: 16 to train on, 4 to test on" in note(task, "4 classes")
    assert sorted(tested) == paths(read_manifest(root / "audio"))
    assert read_clip(read_task("esc50", root, fold=1).train, 0, 16_000, 160_000).shape == (16_000,)


@pytest.mark.parametrize("fold", [None, 0, 6, 7])
def test_a_fold_that_does_not_exist(tmp_path, fold):
    with pytest.raises(ManifestError, match=f"^fold is {fold}, expected 1 to 5$"):
        read_task("esc50", make_esc50(tmp_path, seconds=0.01), fold=fold)


def test_a_fold_of_other_folds(tmp_path):
    root = make_esc50(tmp_path, folds=(1, 3), seconds=0.01)
    assert len(read_task("esc50", root, fold=3).train) == 4
    expected = re.escape(f"fold is 2, expected one of those in {Path('meta', 'esc50.csv')}, 1, 3")
    with pytest.raises(ManifestError, match=f"^{expected}$"):
        read_task("esc50", root, fold=2)


def test_clips_of_esc50_that_are_missing(tmp_path):
    root = make_esc50(tmp_path, seconds=0.01)
    first, *rest = sorted((root / "audio").glob("1-*.wav"))
    first.unlink()
    task = read_task("esc50", root, fold=2)
    assert (len(task.train), len(task.test or ())) == (15, 4)
    assert note(task, "left out") == (
        "esc50: clips listed but not at hand are left out: 1 of 4 (fold 1); "
        f"python -m audiomae.data.check esc50 {root} names them"
    )
    for path in rest:
        path.unlink()
    with pytest.raises(ManifestError, match=rf"fold 1: none of the 4 clips is at hand: no file of {first.name}$"):
        read_task("esc50", root, fold=1)


META = "filename,fold,target,category\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("filename,fold,category\n", r"esc50\.csv: expected a column target, found \['filename', 'fold', 'category'\]"),
        (META + "a.wav,one,0,dog\n", r"esc50\.csv: line 2: fold is 'one' and target '0', expected numbers"),
        (META + "a.wav,1,0,dog\nb.wav,1,0,cat\n", r"esc50\.csv: a\.wav: target 0 is 'dog', elsewhere 'cat'"),
        (META + "a.wav,1,0,dog\nb.wav,1,1,dog\n", r"label 'dog' stands twice in .*esc50\.csv"),
        (META, r"no labels in .*esc50\.csv"),
        (META + '"a.wav"b,1,0,dog\n', r"esc50\.csv: line 2: "),
    ],
)
def test_a_malformed_list_of_esc50(tmp_path, content, reason):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(content)
    with pytest.raises(ManifestError, match=reason):
        read_task("esc50", tmp_path, fold=1)


@pytest.mark.parametrize("below", ["wav", "", "test/wav"])
def test_voxceleb1(tmp_path, below):
    task = read_task("voxceleb1", make_voxceleb1(tmp_path, below=below, seconds=0.1))
    speakers = ("id10001", "id10002", "id10003")
    assert task.labels.keys == speakers
    assert label_counts(task.train) == dict.fromkeys(speakers, 2)
    for manifest, split in ((task.valid, "video_2"), (task.test, "video_3")):
        assert label_counts(manifest) == dict.fromkeys(speakers, 1)
        assert all(f"{split}-xyz" in path and os.path.isfile(path) for path in paths(manifest))


def test_voxceleb1_in_two_folders(tmp_path):
    root = make_voxceleb1(tmp_path, below="dev/wav", seconds=0.1)
    (root / "test" / "wav").mkdir(parents=True)
    (root / "dev" / "wav" / "id10002").rename(root / "test" / "wav" / "id10002")
    (root / "dev" / "wav" / "id10003").rename(root / "id_renamed")
    task = read_task("voxceleb1", root)
    assert label_counts(task.train) == {"id10001": 2, "id10002": 2}
    assert task.labels.keys == ("id10001", "id10002", "id10003")
    assert note(task, "no training clips") == "voxceleb1: no training clips of 1 of 3 classes: id10003"
    assert "2 of 6 (train), 1 of 3 (valid), 1 of 3 (test)" in note(task, "left out")


@pytest.mark.parametrize("line", ["4 id10001/v/00001.wav", "1 id10001/00001.wav", "id10001/v/00001.wav", "1"])
def test_a_malformed_list_of_voxceleb1(tmp_path, line):
    (tmp_path / "iden_split.txt").write_text(f"1 id10001/v/00001.wav\n\n{line}\n")
    with pytest.raises(ManifestError, match=rf"iden_split\.txt: line 3: expected '1 id10001/.*, found '{line}'"):
        read_task("voxceleb1", tmp_path)


MIDS = tuple(mid for mid, _ in AUDIOSET_CLASSES)


def test_audioset(audioset):
    task = read_task("audioset", audioset)
    assert (task.labels.keys, task.labels.names[1]) == (MIDS, "Male speech, man speaking")
    assert (len(task.train), task.valid, len(task.test or ())) == (12, None, 5)
    assert [task.train.labels(clip) for clip in (0, 1)] == [MIDS[:1], MIDS[1:3]]
    assert all(map(os.path.isfile, paths(task.train) + paths(task.test)))
    assert {Path(path).parent.name for path in paths(task.test)} == {"eval"}
    assert note(task, "validation split") == "audioset: there is no validation split"
    balanced = read_task("audioset-20k", audioset)
    assert paths(balanced.train) == paths(task.train)[:6]
    assert paths(balanced.test) == paths(task.test)
    assert task.labels.indices(task.train).counts().sum() == 18


def test_audioset_by_manifests(tmp_path, audioset_json):
    task = read_task("audioset", audioset_json)
    assert (len(task.train), len(task.test or ())) == (12, 5)
    balanced = read_task("audioset-20k", audioset_json)
    assert paths(balanced.train) == paths(task.train)[:6]
    one_file = read_task("audioset", audioset_json / "train_all.json")
    assert paths(one_file.train) == paths(task.train)
    assert paths(one_file.test) == paths(task.test)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join([*MIDS, "/m/0"]))
    given = read_task(
        "audioset-20k",
        audioset_json / "train.json",
        labels=labels,
        valid=audioset_json / "eval_19k.json",
        test=audioset_json / "train_all.json",
    )
    assert [len(given.labels), len(given.train), len(given.valid or ()), len(given.test or ())] == [6, 6, 5, 12]
    assert not any("no validation split" in line for line in given.notes)


def test_audioset_in_the_folders_of_tools(tmp_path, audioset):
    link_copy(audioset, tmp_path / "audios")
    (tmp_path / "metadata").mkdir()
    for path in (tmp_path / "audios").glob("*.csv"):
        path.rename(tmp_path / "metadata" / path.name)
    task = read_task("audioset-20k", tmp_path)
    assert (len(task.train), len(task.test or ())) == (6, 5)


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("abcdefghijk", "abcdefghijk"),
        ("Yabcdefghijk", "abcdefghijk"),
        ("Yabcdefghij", "Yabcdefghij"),
        ("YYbcdefghijk", "Ybcdefghijk"),
        ("a_c-efghij__30.000_40.000", "a_c-efghij_"),
        ("Yabcdefghij_30", "Yabcdefghij"),
        ("Yabcdefghij__30000_40000", "abcdefghij_"),
        ("abcdefghijk_30-40", "abcdefghijk"),
        ("abcdefghijkl", None),
        ("abcdefghij", None),
        ("abcdefghijk_copy", None),
        ("abcdefghijü", None),
    ],
)
def test_names_of_audioset_files(tmp_path, name, video):
    root = make_audioset(tmp_path, train=0, unbalanced=0, evaluation=2, seconds=0.01)
    lines = [f'{video or "xxxxxxxxxxx"}, 0.000, 10.000, "/m/09x0r"', 'zzzzzzzzzzz, 0.000, 10.000, "/m/0jbk"']
    (root / "balanced_train_segments.csv").write_text("\n".join(lines) + "\n")
    (root / "balanced_train").mkdir()
    for file in (f"{name}.wav", "zzzzzzzzzzz.wav"):
        (root / "balanced_train" / file).touch()
    if video is None:
        with pytest.raises(LabelError, match="all 1 training clips are of one class, '/m/0jbk', expected two at least"):
            read_task("audioset-20k", root)
    else:
        task = read_task("audioset-20k", root)
        assert [Path(path).stem for path in paths(task.train)] == [name, "zzzzzzzzzzz"]


def test_audioset_in_part(tmp_path, audioset):
    root = link_copy(audioset, tmp_path / "copy")
    first, *rest = sorted((root / "unbalanced_train").iterdir())
    for path in rest:
        path.unlink()
    (root / "eval" / f"copy of {first.name}").touch()
    os.link(first, root / "eval" / first.name)
    task = read_task("audioset", root)
    assert len(task.train) == 7
    assert Path(paths(task.train)[-1]) == root / "eval" / first.name
    assert "5 of 6 (unbalanced);" in note(task, "left out")
    assert note(task, "names are no").endswith("sound files whose names are no video's id, passed over: 1")
    assert note(task, "of another one").endswith("sound files with the id of another one, passed over: 1")
    first.unlink()
    (root / "eval" / first.name).unlink()
    with pytest.raises(
        ManifestError, match=r"copy: unbalanced: none of the 6 clips is at hand: no file of -unba_00006$"
    ):
        read_task("audioset", root)
    assert len(read_task("audioset-20k", root).train) == 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("rm class_labels_indices.csv", "no class_labels_indices.csv, expected AudioSet's list of classes$"),
        ("rm eval_segments.csv", "neither AudioSet's eval_segments.csv nor a manifest balanced_train_data.json or "),
        ("rm balanced_train_segments.csv", "neither AudioSet's balanced_train_segments.csv nor a manifest balanced_"),
        (
            "eval_segments.csv a, 0, 1, /m/09x0r,/m/a",
            "eval_segments.csv: line 1: 5 fields, expected id, start, end and",
        ),
        ('eval_segments.csv a, 0, 1, "/m/09x0r', "eval_segments.csv: line 1: unexpected end of data"),
    ],
)
def test_malformed_audioset(tmp_path, audioset, change, reason):
    root = link_copy(audioset, tmp_path / "copy")
    name, content = change.split(" ", maxsplit=1)
    (root / (content if name == "rm" else name)).unlink()
    if name != "rm":
        (root / name).write_text(content)
    with pytest.raises(ManifestError, match=reason) as info:
        read_task("audioset-20k", root)
    assert "\n" not in str(info.value)


def test_manifests_of_audioset_that_are_missing(tmp_path, audioset_json):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*gone\.json"):
        read_task("audioset", audioset_json / "gone.json")
    root = link_copy(audioset_json, tmp_path / "copy")
    (root / "eval_19k.json").unlink()
    for source in (root, root / "train_all.json"):
        with pytest.raises(ManifestError, match=r"no eval_data\.json or eval_19k\.json, expected one to test on$"):
            read_task("audioset", source)


def test_a_label_that_audioset_does_not_have(tmp_path, audioset):
    root = link_copy(audioset, tmp_path / "copy")
    segments = (root / "eval_segments.csv").read_text().replace("/m/0jbk", "/m/0jbx")
    (root / "eval_segments.csv").unlink()
    (root / "eval_segments.csv").write_text(segments)
    task = read_task("audioset-20k", root)
    assert task.test is not None
    with pytest.raises(
        LabelError, match=r"^clip \d .*: label '/m/0jbx' is not in .*indices\.csv; did you mean '/m/0jbk'"
    ):
        task.labels.indices(task.test)


def test_the_demo():
    task = read_task("demo", None)
    assert (len(task.labels), len(task.train), len(task.valid or ()), task.test) == (11, 88, 38, None)
    assert set(label_counts(task.train)) == set(label_counts(task.valid)) == set(task.labels.keys)
    assert sorted(paths(task.train) + paths(task.valid)) == sorted(paths(read_manifest()))
    assert paths(task.train) == paths(read_task("demo", None, seed=1).train)


def test_own_lists(tmp_path):
    train = make_manifest(tmp_path, seconds=0.01)
    task = read_task("manifest", train, valid=tmp_path / "valid.csv", test=str(tmp_path / "test.csv"))
    assert task.labels.keys == ("bell", "horn")
    for split, manifest in (("train", task.train), ("valid", task.valid), ("test", task.test)):
        assert label_counts(manifest) == {"bell": 3, "horn": 3}
        assert all(Path(path).parent.name == split for path in paths(manifest))
    alone = read_task("manifest", train)
    assert (alone.valid, alone.test) == (None, None)
    assert alone.notes == ("manifest: 2 classes, clips: 6 to train on",)


def test_own_lists_with_a_label_file(tmp_path):
    train = make_manifest(tmp_path, seconds=0.01)
    (tmp_path / "labels.txt").write_text("horn\ndrum\nbell\ngong\n")
    task = read_task("manifest", train, labels=tmp_path / "labels.txt")
    assert task.labels.keys == ("horn", "drum", "bell", "gong")
    assert note(task, "no training clips") == "manifest: no training clips of 2 of 4 classes: drum, gong"
    (tmp_path / "labels.txt").write_text("horn\nbells\n")
    task = read_task("manifest", train, labels=tmp_path / "labels.txt")
    with pytest.raises(LabelError, match=r"bell_0\.wav\): label 'bell' is not in .*labels\.txt; did you mean 'bells'"):
        task.labels.indices(task.train)


def test_folders_of_classes(tmp_path):
    root = make_class_folders(tmp_path / "a", seconds=0.01)
    (root / "horn" / "deep").mkdir()
    (root / "horn" / "0.wav").rename(root / "horn" / "deep" / "x.wav")
    task = read_task("manifest", root, valid=root)
    assert label_counts(task.train) == label_counts(task.valid) == {"bell": 3, "horn": 3}
    (root / "beside.wav").touch()
    with pytest.raises(
        LabelError, match=r"a: beside\.wav lies beside the folders of the classes, expected every clip in"
    ):
        read_task("manifest", root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="empty: no audio files below it, expected a folder for each class"):
        read_task("manifest", tmp_path / "empty")


def test_training_clips_of_one_class(tmp_path):
    train = make_manifest(tmp_path, classes=["bell"], seconds=0.01)
    with pytest.raises(LabelError, match=r"^manifest: all 3 training clips are of one class, 'bell', expected two"):
        read_task("manifest", train)
    train.write_text('path,labels\nx.wav,bell\nx.wav,"bell,horn"\n')
    assert len(read_task("manifest", train).train) == 2


def test_own_lists_without_labels(tmp_path):
    (tmp_path / "a.csv").write_text("path\nx.wav\n")
    make_manifest(tmp_path / "b", seconds=0.01)
    with pytest.raises(LabelError, match=r"a\.csv: clips have no labels, expected a column label or labels"):
        read_task("manifest", tmp_path / "a.csv")
    with pytest.raises(LabelError, match=r"a\.csv: clips have no labels"):
        read_task("manifest", tmp_path / "b" / "train.csv", test=tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*gone\.csv"):
        read_task("manifest", tmp_path / "b" / "train.csv", valid=tmp_path / "gone.csv")


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("imagenet", {}, "data set is 'imagenet', expected one of audioset, audioset-20k, esc50, speech-commands-v1, "),
        ("esc50", {"root": None}, "data of esc50 is None, expected the folder or list that it lies in"),
        ("demo", {}, "data of demo is .*, expected none: its clips come with the package"),
        ("voxceleb1", {"fold": 1}, "fold is 1, but voxceleb1 takes none"),
        ("esc50", {"valid": "a.csv", "fold": 1}, "valid is a.csv, but esc50 takes none"),
        ("speech-commands-v2", {"labels": "a.csv"}, "labels is a.csv, but speech-commands-v2 takes none"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, name, arguments, reason):
    with pytest.raises(ManifestError, match=f"^{reason}"):
        read_task(**{"name": name, "root": tmp_path, **arguments})

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiomae.data import Manifest, ManifestError
from audiomae.data.labels import LabelError, Labels, read_labels

LABELS = Labels(("/m/a", "/m/b", "/m/c"), ("Bell", "Horn", "Drum"), source="labels.csv")


@given(st.lists(st.lists(st.sampled_from(LABELS.keys), min_size=1), min_size=1))
def test_the_classes_of_clips(clips):
    ids = pickle.loads(pickle.dumps(LABELS.indices(Manifest((str(i), labels) for i, labels in enumerate(clips)))))
    assert len(ids) == len(clips)
    assert ids.num_classes == 3
    targets = np.zeros((len(clips), 3), int)
    for clip, labels in enumerate(clips):
        assert ids[clip].dtype == np.int64
        targets[clip, ids[clip]] += 1
        assert {LABELS.keys[i] for i in ids[clip]} == set(labels)
    assert targets.max() == 1
    np.testing.assert_array_equal(ids[-1], ids[len(clips) - 1])
    np.testing.assert_array_equal(ids.counts(), targets.sum(0))
    with pytest.raises(IndexError):
        ids[len(clips)]


def test_labels_in_order():
    assert len(LABELS) == 3
    assert [LABELS.index(key) for key in LABELS.keys] == [0, 1, 2]
    assert pickle.loads(pickle.dumps(LABELS)) == LABELS
    assert Labels(LABELS.keys, LABELS.names, source="elsewhere") == LABELS


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("wholly else", "label 'wholly else' is not in labels.csv$"),
        ("/m/bx", "label '/m/bx' is not in labels.csv; did you mean '/m/b'[?]$"),
        ("Horn", "label 'Horn' is not in labels.csv, where 'Horn' has the key '/m/b'$"),
    ],
)
def test_a_label_that_is_not_known(label, reason):
    with pytest.raises(LabelError, match=f"^{reason}"):
        LABELS.index(label)
    manifest = Manifest([("x.wav", ["/m/a"]), ("y.wav", ["/m/b", label])], root="clips")
    with pytest.raises(LabelError, match=rf"^clip 1 \(clips/y\.wav\): {reason}"):
        LABELS.indices(manifest)


def test_clips_without_a_label_or_with_too_many():
    manifest = Manifest([("x.wav", ["/m/a"]), ("y.wav", [])], root="")
    with pytest.raises(LabelError, match=r"^clip 1 \(y\.wav\): has no label$"):
        LABELS.indices(manifest)
    manifest = Manifest([("x.wav", ["/m/a", "/m/a"]), ("y.wav", ["/m/a", "/m/c"])], root="")
    with pytest.raises(LabelError, match=r"^clip 1 \(y\.wav\): has 2 labels, expected one$"):
        LABELS.indices(manifest, single=True)
    assert LABELS.indices(manifest).counts().tolist() == [2, 0, 1]


def test_the_labels_of_manifests():
    first, second = Manifest([("x.wav", ["b", "a"])]), Manifest([("x.wav", ["c"]), ("y.wav", ["a"])])
    labels = Labels.of(first, second)
    assert labels.keys == labels.names == ("a", "b", "c")
    with pytest.raises(LabelError, match="label 'd' is not in the labels of these clips"):
        labels.index("d")
    with pytest.raises(LabelError, match="the clips have no labels"):
        Labels.of(Manifest([("x.wav", ())]))


@pytest.mark.parametrize(
    ("keys", "names", "reason"),
    [
        ((), (), "no labels in the labels"),
        (("a", "b"), ("a",), "1 names for 2 labels in the labels"),
        (("a", "b", "b", "a"), ("a", "b", "c", "d"), "label 'a' stands twice in the labels"),
    ],
)
def test_labels_that_are_none(keys, names, reason):
    with pytest.raises(LabelError, match=f"^{reason}$") as info:
        Labels(keys, names)
    assert isinstance(info.value, ManifestError)


def test_a_label_file_of_audioset(tmp_path):
    path = tmp_path / "Class_Labels.CSV"
    path.write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n', "utf-8-sig"
    )
    labels = read_labels(path)
    assert labels.keys == ("/m/09x0r", "/m/05zppz")
    assert labels.names == ("Speech", "Male speech, man speaking")
    assert labels.source == str(path)


def test_a_label_file_with_one_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("zebra\n a b \nÄpfel\n\n", "utf-8-sig")
    labels = read_labels(str(tmp_path / "a.txt"))
    assert labels.keys == labels.names == ("zebra", "a b", "Äpfel")


HEADER = "index,mid,display_name\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "", r"a\.csv: expected a column index, found \[\]"),
        ("a.csv", "index,mid\n0,/m/a\n", r"a\.csv: expected a column display_name, found \['index', 'mid'\]"),
        ("a.csv", HEADER, r"no labels in .*a\.csv"),
        ("a.csv", HEADER + "0,/m/a,A\n2,/m/b,B\n", r"a\.csv: line 3: index is '2', expected 1"),
        ("a.csv", HEADER + "1,/m/a,A\n", r"a\.csv: line 2: index is '1', expected 0"),
        ("a.csv", HEADER + "0,/m/a,A\n1,/m/a,B\n", r"label '/m/a' stands twice in .*a\.csv"),
        ("a.csv", HEADER + "0,/m/a,Male, man\n", r"a\.csv: line 2: 4 fields under a header of 3"),
        ("a.csv", HEADER + "0,,A\n", r"a\.csv: line 2: mid is '' and display_name 'A', expected both"),
        ("a.csv", HEADER + '0,/m/a,"A" B\n', r"a\.csv: line 2: "),
        ("a.csv", b"\xff", r"a\.csv: .* byte 0xff"),
        ("a.txt", "\n", r"no labels in .*a\.txt"),
        ("a.txt", "a\n\nb\n", r"a\.txt: line 2: is empty, expected a name"),
        ("a.txt", "a\nb\na \n", r"label 'a' stands twice in .*a\.txt"),
        ("a.json", "[]", r"a\.json: a label file is a \.csv or a \.txt"),
    ],
)
def test_malformed_label_files(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LabelError, match=reason) as info:
        read_labels(tmp_path / name)
    assert "\n" not in str(info.value)


def test_a_missing_label_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such label file: .*missing\.csv"):
        read_labels(tmp_path / "missing.csv")

"""Label files that somebody else wrote, and clips that are labelled by them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from audiomae.data import read_manifest
from audiomae.data.labels import LabelError, read_labels

from .edits import seldom, sometimes
from .fuzzing import Fuzz
from .texts import File, csv_text, ends, files, long_texts, quotes, texts
from .worker import Target

GOOD_KEYS = ("/m/09x0r", "/m/a", "/m/b", "Speech", "Male speech, man speaking", "é", "bell", "horn")
KEYS = (
    *("", " ", "a,b", '"', "e\u0301", " /m/a", "\x1f", "a\x1fb", "\0", "a\nb", "a\rb", "a\x0bb", "a\u2028b", "\ufeff"),
    *("x" * 2000, "x" * 1999 + "y", "\ufffd"),
)
INDICES = ("0", "1", "2", "3", "00", " 0", "-1", "0.0", "\u0660", "", "9" * 5000, "nan")
COLUMNS = ("index", "mid", "display_name")


class Case(NamedTuple):
    """A label file, and the labels of clips."""

    file: File
    clips: list[list[str]]


def write(folder: Path, case: Case) -> None:
    case.file.write(folder)
    labels = [",".join(labels).replace("\x1f", "") for labels in case.clips]  # that is the manifests' own business
    records = [{"wav": f"{clip}.wav", "labels": text} for clip, text in enumerate(labels)]
    (folder / "clips.json").write_text(json.dumps({"data": records}))


def read(folder: Path) -> None:
    (path,) = [path for path in folder.iterdir() if path.name != "clips.json"]
    labels = read_labels(path)
    assert len(labels) == len(labels.keys) == len(labels.names) == len(set(labels.keys))
    for number, key in enumerate(labels.keys):
        assert isinstance(key, str), key
        assert key, "an empty key"
        assert labels.index(key) == number
    manifest = read_manifest(folder / "clips.json")
    ids = labels.indices(manifest)
    assert len(ids) == len(manifest)
    for clip in range(len(ids)):
        assert {labels.keys[i] for i in ids[clip]} == set(manifest.labels(clip))
    assert ids.counts().sum() == sum(len(np.unique(ids[clip])) for clip in range(len(ids)))


good_names = st.sampled_from(GOOD_KEYS)
wild_names = st.one_of(st.sampled_from(KEYS), texts, long_texts)
wild_rows = st.lists(st.one_of(st.sampled_from(INDICES), texts, long_texts), max_size=4)
wild_headers = st.lists(st.sampled_from(COLUMNS), max_size=4)


@st.composite
def names(draw: st.DrawFn, min_size: int = 0, max_size: int = 5) -> list[str]:
    """Names of classes; most of them are as they should be."""
    found = draw(st.lists(good_names, min_size=min_size, max_size=max_size, unique=True))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        found.insert(draw(st.integers(0, len(found))), draw(wild_names))
    return found


@st.composite
def csv_cases(draw: st.DrawFn) -> Case:
    """Classes as AudioSet lists them."""
    keys = draw(names())
    rows = [draw(wild_headers) if draw(seldom) else list(COLUMNS)]
    for number, key in enumerate(keys):
        rows.append(draw(wild_rows) if draw(seldom) else [str(number), key, f"the {key}"])
    text = csv_text(rows, draw(quotes), draw(ends))
    return Case(draw(files("labels.csv", st.just(text))), draw(clips_of(keys)))


@st.composite
def txt_cases(draw: st.DrawFn) -> Case:
    """A name a line."""
    keys = draw(names())
    return Case(draw(files("labels.txt", st.just(draw(ends).join(keys)))), draw(clips_of(keys)))


def clips_of(keys: list[str]) -> st.SearchStrategy[list[list[str]]]:
    """Make labels of clips, which most label files have."""
    label = st.sampled_from(keys) if keys else good_names
    return st.lists(st.lists(label, min_size=1, max_size=3), min_size=1, max_size=2).flatmap(
        lambda clips: sometimes(5, names(1, 2).map(lambda wild: [*clips, wild]), clips)
    )


TARGET = Target(write, (read,), (LabelError,))


# Each of these once ended otherwise than in a refusal of one short line, in little time.
LONG = "".join(map(chr, range(0x4E00, 0x9E00))) * 2
EXAMPLES = [
    Case(File("labels.csv", f"index,mid,display_name\n0,{'x' * 5000},bell\n"), [["horn"], ["y" * 5000], ["bell"]]),
    Case(File("labels.csv", f"index,mid,display_name\n{'9' * 5000},/m/a,bell\n"), [["horn"]]),
    Case(File("labels.txt", f"{LONG}\n{LONG[::-1]}\n"), [[LONG[7:]]]),
    Case(File("labels.txt", f"{'x' * 5000}\n{'x' * 5000}\n"), [["horn"]]),
]


@pytest.mark.share(2)
def test_csv_labels(fuzz: Fuzz):
    fuzz(TARGET, csv_cases(), EXAMPLES)


@pytest.mark.share(2)
def test_txt_labels(fuzz: Fuzz):
    fuzz(TARGET, txt_cases())


@pytest.mark.parametrize("name", ["labels.csv", "labels.txt"])
def test_a_folder_is_no_label_file(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    with pytest.raises(LabelError, match=rf"{name}: a label file is a \.csv or a \.txt"):
        read_labels(tmp_path / name)

"""Manifests that somebody else wrote: CSV, the JSON of AST, folders of files."""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from audiomae.data import ManifestError, read_manifest

from .edits import seldom
from .fuzzing import Fuzz
from .texts import File, csv_text, ends, files, long_texts, quotes, texts
from .worker import Target

GOOD_PATHS = (
    "a.wav",
    "b/c.flac",
    "a b.wav",
    "é.wav",
    "e\u0301.wav",
    "日本.wav",
    "\U0001f40d.ogg",
    "b/../a.wav",
    "here/a",
)
PATHS = (
    *(
        "",
        " ",
        ".",
        "..",
        "../a.wav",
        "b/../../a.wav",
        "/etc/passwd",
        "//a",
        "./a.wav",
        "b//c.wav",
        "b/",
        "~/a.wav",
        "-",
    ),
    *("a\\..\\b", "C:\\a.wav", "file:///etc/passwd", "http://a/b.wav", "%2e%2e/a.wav", "$HOME/a", "link/a.wav"),
    *(
        "a\0b",
        "\0",
        "a\nb.wav",
        "a\rb",
        "\x1f",
        "\x7f",
        "\u2028.wav",
        "\ufeffa.wav",
        "\u202ewav.a",
        "x" * 300,
        "x/" * 300,
    ),
)
NUMBERS = (
    *(
        "",
        "0",
        "1.5",
        " 2 ",
        "-1",
        "-0.0",
        "nan",
        "inf",
        "-inf",
        "1e308",
        "1e400",
        "1e-320",
        "1_000",
        "0x10",
        "٣",
        "1,5",
    ),
    *("9" * 5000, "1e", "None", "true", "0.0000001", "9223372036854775808"),
)
LABELS = ("", "bell", "/m/a,/m/b", ",", "a,,b", "a\x1fb", '"', "é", " bell ", "a,a", "x" * 1000, "\x1f")
COLUMNS = (
    "path",
    "file",
    "filename",
    "wav",
    "label",
    "labels",
    "start",
    "duration",
    "fold",
    "",
    " path ",
    "\ufeffpath",
)

SMALL = 50


def write(folder: Path, case: File) -> None:
    root = folder / "root"
    root.mkdir()
    (root / "link").symlink_to(folder)
    (root / "here").symlink_to(root)
    case.write(root)


def read(folder: Path) -> None:
    (path,) = [path for path in (folder / "root").iterdir() if path.is_file()]
    check(read_manifest(path), path.parent)


def read_exactly(folder: Path) -> None:
    """Compare with what a JSON says."""
    path = folder / "root" / "clips.json"
    manifest = read_manifest(path, allow_outside=True)
    records = json.loads(path.read_text("utf-8-sig"))["data"]
    assert len(manifest) == len(records)
    for clip, record in enumerate(records):
        labels = tuple(label.strip() for label in record.get("labels", "").split(",") if label.strip())
        assert manifest.labels(clip) == labels, (manifest.labels(clip), labels)
        assert manifest.path(clip) == os.path.join(path.parent, record["wav"])


def read_allowing(folder: Path) -> None:
    (path,) = [path for path in (folder / "root").iterdir() if path.is_file()]
    check(read_manifest(path, allow_outside=True), None)


def check(manifest: Any, root: Path | None) -> None:
    """Check that every clip of a manifest can be used, and lies below a root."""
    for clip in range(min(len(manifest), SMALL)):
        path, labels, (start, duration) = manifest.path(clip), manifest.labels(clip), manifest.segment(clip)
        assert isinstance(path, str), path
        assert path, "an empty path"
        assert "\0" not in os.fsdecode(os.fsencode(path)), path
        assert all(isinstance(label, str) for label in labels), labels
        assert 0 <= start < math.inf, start
        assert duration is None or 0 < duration < math.inf, duration
        if root is not None:
            inside = Path(os.path.normpath(path)).is_relative_to(root)  # by name: links are the owner's business
            assert inside, f"{path} lies outside {root}"
    part = manifest.select(range(len(manifest) - 1, -1, -1))
    assert len(part) == len(manifest)
    assert (part.path(0), part.labels(0)) == (manifest.path(len(manifest) - 1), manifest.labels(len(manifest) - 1))


PATH = st.sampled_from(GOOD_PATHS * 4 + PATHS)
FIELDS = {
    **dict.fromkeys(("path", "file", "filename", "wav"), PATH),
    **dict.fromkeys(("label", "labels"), st.sampled_from(LABELS)),
    **dict.fromkeys(("start", "duration"), st.sampled_from(NUMBERS)),
}


@st.composite
def csv_texts(draw: st.DrawFn) -> str:
    """A header and rows; most of them are as they should be."""
    extra = st.lists(st.sampled_from(COLUMNS), max_size=4)
    columns = draw(extra) if draw(seldom) else draw(st.permutations(["path", *draw(extra)]))
    rows = [columns]
    for _ in range(draw(st.integers(0, 4))):
        wild = draw(seldom)
        rows.append(
            draw(st.lists(st.one_of(texts, long_texts), max_size=6))
            if wild
            else [draw(FIELDS.get(column.strip(), texts)) for column in columns]
        )
    return csv_text(rows, draw(quotes), draw(ends))


plain = st.one_of(
    st.none(), st.booleans(), st.floats(), st.integers(), st.sampled_from([10**400, -(10**20), 0]), texts, long_texts
)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """A clip of the JSON of AST; most of them are as they should be."""
    record: dict[str, Any] = {"wav": draw(PATH), "labels": draw(st.sampled_from(LABELS))}
    if draw(seldom):
        record[draw(st.sampled_from(["wav", "labels", "start", "x"]))] = draw(values)
    if draw(seldom):
        record.pop(draw(st.sampled_from(["wav", "labels"])))
    return record


def nested(depth: int) -> str:
    return '{"data":' + "[" * depth + "]" * depth + "}"


json_texts = st.one_of(
    st.builds(json.dumps, st.fixed_dictionaries({"data": st.lists(records(), max_size=4)}), ensure_ascii=st.booleans()),
    st.builds(json.dumps, st.fixed_dictionaries({"data": st.lists(records() | values, max_size=4)})),
    st.builds(json.dumps, values),
    st.integers(0, 100_000).map(nested),
    st.integers(4000, 6000).map(lambda digits: '{"data": [' + "9" * digits + "]}"),
)


CSV = Target(write, (read, read_allowing), (ManifestError,))
JSON = Target(write, (read, read_exactly), (ManifestError,))


# Each of these once ended otherwise than in a result or a refusal.
CSV_EXAMPLES = [
    *(
        File("clips.csv", text)
        for text in (f"{'9' * 5000}\n", f"path,start\na.wav,{'x' * 5000}\n", f"path\n../{'x' * 5000}\n")
    ),
]
JSON_EXAMPLES = [
    File("clips.json", '{"data": [{"wav": "a.wav", "labels": "a\\u001fb"}]}'),
    File("clips.json", nested(100_000)),
    File("clips.json", f'{{"data": [{"9" * 5000}]}}'),
]


@pytest.mark.share(4)
def test_csv_manifests(fuzz: Fuzz):
    fuzz(CSV, files("clips.csv", csv_texts()), CSV_EXAMPLES)


@pytest.mark.share(4)
def test_json_manifests(fuzz: Fuzz):
    fuzz(JSON, files("clips.json", json_texts), JSON_EXAMPLES)


NAMES = (
    *(b"a.wav", b"b.WAV", b".hidden.wav", b"a\nb.wav", b"\xff\xfe.wav", b"-rf.wav", b"a.wav.txt", b" .wav", b"..wav"),
    *(b"\xc3\xa9.flac", b"x" * 250 + b".ogg", b"\x1f.wav", b"\xe2\x80\xae.wav", b"*.wav", b"~.wav", b"wav", b"a.raw"),
)
KINDS = ("file", "folder", "pipe", "dangling", "loop", "up", "outside", "self")


def write_folder(folder: Path, case: list[tuple[list[bytes], str]]) -> None:
    root = folder / "root"
    root.mkdir()
    (folder / "outside.wav").touch()
    make: dict[str, Callable[[Path], object]] = {
        "file": lambda path: path.write_bytes(b"RIFF"),
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
        "dangling": lambda path: path.symlink_to("nowhere"),
        "loop": lambda path: path.symlink_to("."),
        "up": lambda path: path.symlink_to(root),
        "outside": lambda path: path.symlink_to(folder / "outside.wav"),
        "self": lambda path: path.symlink_to(path.name),
    }
    for parents, kind in case:
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), *parents)))
        with suppress(OSError):  # such a name cannot be made here
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                make[kind](path)


def read_folder(folder: Path) -> None:
    check(read_manifest(folder / "root"), None)


entries = st.lists(
    st.tuples(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), st.sampled_from(KINDS)), max_size=6
)


@pytest.mark.share(2)
def test_folders(fuzz: Fuzz):
    fuzz(Target(write_folder, (read_folder,), (ManifestError,)), entries)

import json
import os
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiomae.data import Manifest, ManifestError, read_manifest

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0\x1f"), min_size=1)
AWKWARD_NAMES = ("a b.wav", "Größe, ☃.flac", "c.MP3", 'quote".Ogg', "日本.aif")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def paths(manifest: Manifest) -> list[str]:
    return [manifest.path(clip) for clip in range(len(manifest))]


@given(st.lists(st.tuples(NAMES, st.lists(NAMES)), min_size=1))
def test_a_manifest_gives_back_what_went_in(clips):
    manifest = pickle.loads(pickle.dumps(Manifest(clips, root="")))
    assert [(path, list(manifest.labels(i))) for i, path in enumerate(paths(manifest))] == clips
    assert manifest.has_labels == any(labels for _, labels in clips)
    with pytest.raises(IndexError):
        manifest.path(len(clips))


SECONDS = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(st.tuples(NAMES, st.lists(NAMES), SECONDS, st.none() | st.floats(1e-3, 1e6)), min_size=1), st.data())
def test_a_manifest_of_parts_of_files(parts, data):
    whole = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    clips = [part[:2] if is_whole else part for part, is_whole in zip(parts, whole, strict=True)]
    expected = [(0.0, None) if is_whole else part[2:] for part, is_whole in zip(parts, whole, strict=True)]
    manifest = pickle.loads(pickle.dumps(Manifest(clips, root="")))
    assert [manifest.segment(i) for i in range(len(manifest))] == expected
    assert manifest.segment(-1) == expected[-1]
    assert paths(manifest) == [path for path, *_ in parts]
    with pytest.raises(IndexError):
        manifest.segment(len(clips))

    numbers = data.draw(st.lists(st.integers(0, len(parts) - 1), min_size=1))
    chosen = manifest.select(iter(numbers))
    assert [(chosen.path(i), chosen.labels(i), chosen.segment(i)) for i in range(len(chosen))] == [
        (manifest.path(i), manifest.labels(i), manifest.segment(i)) for i in numbers
    ]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ((-0.5, 1.0), "clip 1: start is -0.5 s, expected at least 0"),
        ((float("nan"), None), "clip 1: start is nan s, expected at least 0"),
        ((float("inf"), None), "clip 1: start is inf s, expected at least 0"),
        ((0.0, 0.0), r"clip 1: duration is 0\.0 s, expected more than 0"),
        ((0.0, float("inf")), "clip 1: duration is inf s, expected more than 0"),
        ((1e300, None), r"clip 1: start is 1e\+300 s, expected at least 0 and at most 1e\+09"),
        ((0.0, 1e300), r"clip 1: duration is 1e\+300 s, expected more than 0 and at most 1e\+09"),
    ],
)
def test_a_part_that_cannot_be_one(part, reason):
    with pytest.raises(ManifestError, match=reason):
        Manifest([("x.wav", ()), ("x.wav", (), *part)])


def test_a_selection_of_nothing():
    with pytest.raises(ManifestError, match="no clips"):
        Manifest([("x.wav", ())]).select([])


def test_joined_manifests(tmp_path):
    first = Manifest([("x.wav", ("a",)), ("y.wav", ("b",), 1.0, 2.0)], root=tmp_path)
    second = Manifest([("z.wav", ("a", "c"))], root=tmp_path / "sub")
    for others in ([second], [first, second], []):
        joined = Manifest.join([first, *others])
        assert [(joined.path(i), joined.labels(i), joined.segment(i)) for i in range(len(joined))] == [
            (manifest.path(i), manifest.labels(i), manifest.segment(i))
            for manifest in (first, *others)
            for i in range(len(manifest))
        ]


@pytest.mark.parametrize("labels", [["a\x1fb"], ["a", "\x1f", "b"]])
def test_a_label_that_would_come_out_as_two(labels):
    with pytest.raises(ManifestError, match=rf"clip 1: labels {re.escape(repr(labels))}, expected none with '\\x1f'"):
        Manifest([("x.wav", ["a", "b"]), ("x.wav", labels)])


def test_a_manifest_of_nothing():
    with pytest.raises(ManifestError, match="no clips"):
        Manifest([])


def test_a_file_name_that_is_not_unicode(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.wav")).touch()
    except OSError:
        pytest.skip("the file system takes Unicode names only")
    assert os.fsencode(read_manifest(tmp_path).path(0)).endswith(b"caf\xe9.wav")


def test_the_demo_clips():
    manifest = read_manifest()
    assert len(manifest) == 126
    assert manifest.has_labels
    assert manifest.path(0).endswith("ambi_choir.flac")
    assert manifest.labels(0) == ("ambient",)


def test_a_folder(tmp_path):
    touch(
        tmp_path,
        *AWKWARD_NAMES,
        "sub/deep/x.wav",
        "sub/x.wav",
        "notes.txt",
        ".hidden.wav",
        ".git/x.wav",
        "wav",
        "x.raw",
    )
    manifest = read_manifest(tmp_path)
    assert paths(manifest) == sorted(str(tmp_path / name) for name in (*AWKWARD_NAMES, "sub/deep/x.wav", "sub/x.wav"))
    assert not manifest.has_labels
    assert manifest.labels(0) == ()
    assert paths(read_manifest(str(tmp_path))) == paths(manifest)


def test_a_folder_with_links(tmp_path):
    touch(tmp_path, "data/x.wav", "elsewhere/y.wav")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    names = [path.removeprefix(str(tmp_path)) for path in paths(read_manifest(tmp_path / "data"))]
    assert names == ["/data/link/y.wav", "/data/x.wav"]


@pytest.mark.parametrize("links", [("x/link y", "y/link x"), ("x/link y", "y/link y"), ("x/link x/..", "y/link .")])
def test_folders_that_link_to_each_other(tmp_path, links):
    touch(tmp_path, "x/x.wav", "y/y.wav")
    for link in links:
        name, target = link.split()
        (tmp_path / name).symlink_to(tmp_path / target)
    names = {path.removeprefix(str(tmp_path)) for path in paths(read_manifest(tmp_path))}
    expected = {"/x/x.wav", "/y/y.wav"}
    if links == ("x/link y", "y/link x"):
        expected |= {"/x/link/y.wav", "/y/link/x.wav"}
    if links == ("x/link y", "y/link y"):
        expected |= {"/x/link/y.wav"}
    assert names == expected
    assert len(read_manifest(tmp_path)) == len(names)


def test_a_folder_without_audio(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(ManifestError, match=r"no audio files .* looked for .*\.flac .*\.opus .*\.wav"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("column", ["path", "file", "filename", "wav"])
def test_a_csv(tmp_path, column):
    source = tmp_path / "Clips.CSV"
    rows = [
        f"id,{column}, label",
        *(f'{i},"{name.replace(chr(34), chr(34) * 2)}","a, b"' for i, name in enumerate(AWKWARD_NAMES)),
    ]
    source.write_text("\n".join([*rows, "", '7,/absolute.wav,""', '8,/absolute.wav,""']), encoding="utf-8-sig")
    manifest = read_manifest(source, allow_outside=True)
    assert paths(manifest) == [*(str(tmp_path / name) for name in AWKWARD_NAMES), "/absolute.wav", "/absolute.wav"]
    assert [manifest.labels(clip) for clip in (0, -1)] == [("a, b",), ()]


def test_csv_labels_in_the_plural(tmp_path):
    (tmp_path / "a.csv").write_text('wav,labels\nx.wav,"/m/a, /m/b,"\ny.wav,\n')
    manifest = read_manifest(tmp_path / "a.csv")
    assert [manifest.labels(clip) for clip in range(2)] == [("/m/a", "/m/b"), ()]


def test_parts_of_files_in_a_csv(tmp_path):
    rows = ["path,label, start ,duration", "x.wav,a,,", "x.wav,a,0.5,1", "x.wav,a, 2 ,", "x.wav,a,,0.25"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    manifest = read_manifest(tmp_path / "a.csv")
    assert [manifest.segment(i) for i in range(4)] == [(0.0, None), (0.5, 1.0), (2.0, None), (0.0, 0.25)]
    (tmp_path / "a.csv").write_text("start,path\n3,x.wav\n")
    assert read_manifest(tmp_path / "a.csv").segment(0) == (3.0, None)


def test_a_json(tmp_path):
    data = [{"wav": name, "labels": "/m/a,/m/b"} for name in AWKWARD_NAMES] + [{"wav": "/x.wav", "labels": ""}]
    (tmp_path / "a.json").write_text(json.dumps({"data": data}))
    manifest = read_manifest(tmp_path / "a.json", allow_outside=True)
    assert paths(manifest) == [*(str(tmp_path / name) for name in AWKWARD_NAMES), "/x.wav"]
    assert [manifest.labels(clip) for clip in (0, -1)] == [("/m/a", "/m/b"), ()]


def test_a_json_without_labels(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"wav": "x.wav"}, {"wav": "x.wav"}]}))
    manifest = read_manifest(tmp_path / "a.json")
    assert paths(manifest) == [str(tmp_path / "x.wav")] * 2
    assert not manifest.has_labels


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "", r"a\.csv: expected a column path or file or filename or wav, found \[\]"),
        ("a.csv", "name,label\nx.wav,a\n", r"a\.csv: expected a column .*, found \['name', 'label'\]"),
        ("a.csv", "path,label\n", r"a\.csv: no clips"),
        ("a.csv", "path,label\nx.wav,a\nx,y.wav,a\n", r"a\.csv: line 3: 3 fields under a header of 2"),
        ("a.csv", 'path,label\n"x.wav"y,a\n', r"a\.csv: line 2: "),
        ("a.csv", "path,label\nx.wav,a\n,a\n", r"a\.csv: clip 1: '' is no path"),
        ("a.csv", b"path\n\xff.wav\n", r"a\.csv: .* byte 0xff"),
        ("a.csv", "path,start\nx.wav,0\ny.wav,0:05\n", r"a\.csv: line 3: start is '0:05', expected seconds"),
        ("a.csv", "path,duration\nx.wav,1 s\n", r"a\.csv: line 2: duration is '1 s', expected seconds"),
        ("a.csv", "path,duration\nx.wav,-1\n", r"a\.csv: clip 0: duration is -1\.0 s, expected more than 0"),
        ("a.json", "", r"a\.json: line 1, column 1: Expecting value"),
        ("a.json", '{"data": [\n  {"wav": }]}', r"a\.json: line 2, column 11: Expecting value"),
        ("a.json", "[1, 2]", r'a\.json: expected \{"data": \[\.\.\.\]\}, found \[1, 2\]'),
        ("a.json", '{"dat": []}', r"a\.json: expected .*, found \{'dat': \[\]\}"),
        ("a.json", '{"data": []}', r"a\.json: no clips"),
        ("a.json", '{"data": [{"wav": "x"}, {"path": "y"}]}', r"a\.json: data\[1\]: .* \"wav\", found \{'path': 'y'\}"),
        ("a.json", '{"data": [{"wav": 3}]}', r"a\.json: data\[0\]: expected a string \"wav\", found \{'wav': 3\}"),
        ("a.json", '{"data": ["x.wav"]}', r"a\.json: data\[0\]: expected a string \"wav\", found 'x\.wav'"),
        ("a.json", '{"data": [{"wav": "x"}, {"wav": "y", "labels": "a"}]}', r'data\[0\]: expected a string "labels"'),
        ("a.json", '{"data": [{"wav": "x", "labels": ["a"]}]}', r'data\[0\]: expected a string "labels"'),
        ("a.json", '{"data": [{"wav": "x\\u0000.wav"}]}', r"clip 0: 'x\\x00\.wav' is no path"),
        ("a.json", '{"data": [{"wav": "\\ud800.wav"}]}', r"a\.json: .*surrogates not allowed"),
        ("a.json", "[" * 200_000, r"a\.json: expected .*, found brackets in brackets without end"),
        ("a.json", '{"data": ' + "1" * 5_000 + "}", r"a\.json: Exceeds the limit .* for integer string conversion"),
        ("a.csv", f"path\n{'x' * 200_000}\n", r"a\.csv: line 2: field larger than field limit"),
        ("a.txt", "x.wav", r"a\.txt: a manifest is a folder, a \.csv or a \.json"),
    ],
)
def test_malformed_manifests(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ManifestError, match=reason) as info:
        read_manifest(tmp_path / name)
    assert "\n" not in str(info.value)


def test_a_pipe_is_no_manifest(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(ManifestError, match=r"a\.csv: a manifest is a folder, a \.csv or a \.json"):
        read_manifest(tmp_path / "a.csv")  # and does not wait for somebody to write to it


@pytest.mark.parametrize("name", ["missing", "missing.csv", "missing.json"])
def test_a_missing_manifest(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: .*{name}"):
        read_manifest(tmp_path / name)

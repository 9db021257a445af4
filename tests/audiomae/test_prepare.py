import csv
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from audiomae.data import read_manifest, read_waveform
from audiomae.data.manifests import csv_records
from audiomae.data.preparation import conversion

from .preparing import make_sounds, noise, run_prepare, state


def write_list(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def levels(waveform: torch.Tensor) -> np.ndarray:
    return np.rint(waveform.double().numpy() * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)


FORMATS = {
    "a.wav": (16_000, 1, "WAV", "PCM_16"),
    "b.wav": (8_000, 2, "WAV", "PCM_U8"),
    "c.wav": (192_000, 3, "WAV", "FLOAT"),
    "d.wav": (11_025, 1, "WAV", "IMA_ADPCM"),
    "e.flac": (44_100, 2, "FLAC", "PCM_24"),
    "f.mp3": (44_100, 2, "MP3", "MPEG_LAYER_III"),
    "g.mp3": (11_025, 1, "MP3", "MPEG_LAYER_III"),
    "h.ogg": (48_000, 2, "OGG", "VORBIS"),
    "i.opus": (48_000, 1, "OGG", "OPUS"),
    "j.aiff": (22_050, 9, "AIFF", "PCM_16"),
    "k.au": (12_345, 1, "AU", "ULAW"),
}


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    for number, (name, (rate, channels, container, subtype)) in enumerate(FORMATS.items()):
        sf.write(root / name, noise(number, int(1.7 * rate), channels), rate, format=container, subtype=subtype)
    sf.write(root / "one.wav", [0.5], 96_000)
    return root


@pytest.mark.parametrize("container", ["flac", "wav"])
def test_what_is_written_is_the_clip_rounded(formats, tmp_path, capsys, monkeypatch, container):
    monkeypatch.setattr(conversion, "_BLOCK", 5_003)
    code, out, err = run_prepare(capsys, formats, tmp_path / "out", "--format", container, workers=2)
    assert (code, err) == (0, "")
    assert "written 12, there already 0, failed 0\n" in out
    assert out.endswith(f"python -m audiomae.pretrain --data {tmp_path / 'out' / 'manifest.csv'}\n")
    manifest, prepared = read_manifest(formats), read_manifest(tmp_path / "out" / "manifest.csv")
    assert len(prepared) == len(manifest) == 12
    frames = 0
    for clip in range(len(manifest)):
        assert Path(prepared.path(clip)).stem == Path(manifest.path(clip)).stem
        header = sf.info(prepared.path(clip))
        assert (header.format, header.subtype, header.samplerate, header.channels) == (
            container.upper(),
            "PCM_16",
            16_000,
            1,
        )
        sound, _ = sf.read(prepared.path(clip), dtype="int16")
        np.testing.assert_array_equal(sound, levels(read_waveform(manifest.path(clip), 16_000)))
        frames += len(sound)
    original, _ = sf.read(formats / "a.wav", dtype="int16")
    np.testing.assert_array_equal(sf.read(prepared.path(0), dtype="int16")[0], original)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["hours"] == pytest.approx(frames / 16_000 / 3600)
    assert report["bytes_before"] == sum(path.stat().st_size for path in formats.iterdir())
    assert report["bytes_after"] == sum(path.stat().st_size for path in (tmp_path / "out").glob(f"*.{container}"))


def test_other_sample_rates(formats, tmp_path, capsys):
    assert run_prepare(capsys, formats, tmp_path / "out", "--sample-rate", 8_000)[0] == 0
    sound, rate = sf.read(tmp_path / "out" / "e.flac", dtype="int16")
    assert rate == 8_000
    np.testing.assert_array_equal(sound, levels(read_waveform(formats / "e.flac", 8_000)))


def test_labels_that_hold_commas(tmp_path, capsys):
    sf.write(tmp_path / "a.wav", noise(0, 900), 16_000)
    sf.write(tmp_path / "b.wav", noise(1, 900), 16_000)
    label = 'Male speech, man speaking, "so"'
    source = tmp_path / "one.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], ["a.wav", label], ["b.wav", ""]])
    assert run_prepare(capsys, source, tmp_path / "one")[0] == 0
    prepared = read_manifest(tmp_path / "one" / "manifest.csv")
    assert [prepared.labels(clip) for clip in range(2)] == [(label,), ()]

    write_list(tmp_path / "two.csv", "path,labels", 'a.wav,"/m/a,/m/b"', "b.wav,/m/c")
    assert run_prepare(capsys, tmp_path / "two.csv", tmp_path / "two")[0] == 0
    prepared = read_manifest(tmp_path / "two" / "manifest.csv")
    assert [prepared.labels(clip) for clip in range(2)] == [("/m/a", "/m/b"), ("/m/c",)]

    (tmp_path / "three.json").write_text('{"data": [{"wav": "a.wav", "labels": "\\udcff"}]}')
    code, _, err = run_prepare(capsys, tmp_path / "three.json", tmp_path / "three")
    assert code == 2
    assert "clip 0 (" in err
    assert "is no text that UTF-8 can hold" in err


def test_names_that_hold_ends_of_lines(tmp_path, capsys):
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    names = ["a\rb", "c\nd", "e\r\nf", "g,h", 'i"j', "\rk\r"]
    for number, name in enumerate(names):
        sf.write(sounds / f"{name}.wav", 1.5 * noise(number, 900), 16_000, subtype="FLOAT")
        (sounds / f"{name}.flac").write_text("no sound")
    clips = [{"wav": f"{name}.{end}", "labels": f"x{name}y"} for name in names for end in ("wav", "flac")]
    (sounds / "list.json").write_text(json.dumps({"data": clips}))
    code, _, _ = run_prepare(capsys, sounds / "list.json", tmp_path / "out")
    assert code == 1
    source, prepared = read_manifest(sounds / "list.json"), read_manifest(tmp_path / "out" / "manifest.csv")
    assert len(prepared) == len(names)
    for clip, name in enumerate(names):
        assert prepared.path(clip) == str(tmp_path / "out" / f"{name}.flac")
        assert prepared.labels(clip) == source.labels(2 * clip)
    for table, column in (("failed", sounds), ("clipped", Path())):
        records = [record for _, record in csv_records(tmp_path / "out" / f"{table}.csv", ("path",))]
        assert [record["path"] for record in records] == [str(column / f"{name}.flac") for name in names]


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ])
@pytest.mark.parametrize("call", ["stat", "mkdir", "unlink", "replace"])
def test_a_name_that_a_file_system_cannot_hold_is_that_of_one_clip(tmp_path, capsys, monkeypatch, call, number):
    sounds, out = make_sounds(tmp_path / "sounds"), tmp_path / "out"
    (sounds / "bad").mkdir()
    (sounds / "2.wav").rename(sounds / "bad" / "2.wav")
    original = getattr(os, call)

    def refusing(path, *args, **kwargs):
        target = args[0] if call == "replace" else path
        if str(target).startswith(str(out / "bad")):
            raise OSError(number, os.strerror(number), str(target))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, call, refusing)
    code, printed, err = run_prepare(capsys, sounds, out)
    assert (code, err) == (1, "")
    assert "written 5, there already 0, failed 1\n" in printed
    place = out / "bad" / "2.flac"
    assert f"  {sounds / 'bad' / '2.wav'}: cannot be written as {place} ({os.strerror(number)})\n" in printed
    monkeypatch.undo()
    assert "written 1, there already 5, failed 0\n" in run_prepare(capsys, sounds, out)[1]


def test_a_path_that_is_too_long(sounds, tmp_path, capsys):
    deep = "/".join(21 * ["d" * 200]) + "/a"  # of at most 4,095 bytes that the system takes
    source = write_list(tmp_path / "list.csv", "path", f"{deep}.wav", "sounds/0.wav")
    code, printed, err = run_prepare(capsys, source, tmp_path / "out")
    assert (code, err) == (1, "")
    assert "written 1, there already 0, failed 1\n" in printed
    assert f": cannot be written as {tmp_path / 'out' / deep}.flac (File name too long)\n" in printed


def test_parts_repeats_and_names_that_are_alike(tmp_path, capsys):
    sounds = tmp_path / "lists" / "sounds"
    (sounds / "a.flac").mkdir(parents=True)
    for number, name in enumerate(["a.wav", "a.ogg", "a.flac/b.wav", "../../elsewhere.wav"]):
        sf.write(sounds / name, noise(number, 40_000), 16_000)
    elsewhere = tmp_path / "elsewhere.wav"
    source = write_list(
        tmp_path / "lists" / "list.csv",
        "path,start,duration,label",
        "sounds/a.wav,,,whole",
        "sounds/a.ogg,,,other",
        "sounds/a.wav,0.5,1,part",
        "sounds/a.wav,0.5,,rest",
        "sounds/../sounds/a.wav,,,again",
        "sounds/a.flac/b.wav,,,below",
        "../elsewhere.wav,,,outside",
        f"{elsewhere},1,,outside",
        "sounds/a.wav,9,,beyond",
        "sounds/a.wav,9,,beyond again",
    )
    code, _, err = run_prepare(capsys, source, tmp_path / "out")
    assert code == 2
    assert "lies outside the folder of the list" in err
    code, out, _ = run_prepare(capsys, source, tmp_path / "out", "--allow-outside", workers=1)
    assert code == 1
    assert "written 7, there already 0, repeated in the list 2, failed 2\n" in out
    manifest, prepared = read_manifest(source, allow_outside=True), read_manifest(tmp_path / "out" / "manifest.csv")
    places = [os.path.relpath(prepared.path(clip), tmp_path / "out") for clip in range(len(prepared))]
    away = f"outside/{str(tmp_path).lstrip('/')}/elsewhere"
    assert places == [
        "sounds/a.wav.flac",  # sounds/a.flac is a folder
        "sounds/a.ogg.flac",
        "sounds/a_0.500_1.500.flac",
        "sounds/a_0.500_end.flac",
        "sounds/a.wav.flac",
        "sounds/a.flac/b.flac",
        f"{away}.flac",
        f"{away}_1.000_end.flac",
    ]
    for clip in range(len(prepared)):
        assert prepared.labels(clip) == manifest.labels(clip)
        sound, _ = sf.read(prepared.path(clip), dtype="int16")
        np.testing.assert_array_equal(
            sound, levels(read_waveform(manifest.path(clip), 16_000, *manifest.segment(clip)))
        )
    with (tmp_path / "out" / "failed.csv").open(newline="") as file:
        failed = list(csv.DictReader(file))
    assert [(row["start"], row["reason"]) for row in failed] == [
        ("9.0", "lasts 2.5 s, expected a part of it from 9 s on"),
        ("9.0", "as clip 8 is"),
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    files = [sounds / "a.wav", sounds / "a.ogg", sounds / "a.flac" / "b.wav", elsewhere]
    assert report["bytes_before"] == sum(path.stat().st_size for path in files)  # each once


@pytest.fixture
def sounds(tmp_path) -> Path:
    return make_sounds(tmp_path / "sounds")


def test_a_second_run_keeps_what_is_there(sounds, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_prepare(capsys, sounds, out)[0] == 0
    before = state(out)
    listed, report = (out / "manifest.csv").read_text(), json.loads((out / "report.json").read_text())
    code, printed, _ = run_prepare(capsys, sounds, out, workers=1)
    assert code == 0
    assert "written 0, there already 6, failed 0\n" in printed
    assert state(out) == before
    assert (out / "manifest.csv").read_text() == listed
    again = json.loads((out / "report.json").read_text())
    assert again == {**report, "written": 0, "kept": 6}
    assert os.listdir(out / ".prepare" / "..") != []
    assert not (out / ".prepare" / "writing").exists()


def test_a_second_run_mends_what_changed(sounds, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_prepare(capsys, sounds, out)[0] == 0
    before = state(out)
    (out / "0.flac").unlink()  # lost
    (out / "2.flac").write_bytes((out / "2.flac").read_bytes()[:-1])  # cut off, as a crash of the machine may do
    sf.write(sounds / "4.wav", noise(9, 4_004), 16_000)  # another sound of the same size
    (sounds / "sub" / "1.wav").unlink()  # no longer listed
    sf.write(sounds / "new.wav", noise(10, 4_000), 16_000)
    code, printed, _ = run_prepare(capsys, sounds, out)
    assert code == 0
    assert "written 4 (2 in place of other files), there already 2, failed 0\n" in printed
    assert f"1 files of clips that the list no longer has stay in {out}\n" in printed
    after = state(out)
    assert {name for name in before if after[name] == before[name]} == {"sub/1.flac", "sub/3.flac", "sub/5.flac"}
    prepared = read_manifest(out / "manifest.csv")
    assert len(prepared) == 6
    for clip in range(6):
        source = sounds / os.path.relpath(prepared.path(clip), out)
        np.testing.assert_array_equal(
            sf.read(prepared.path(clip), dtype="int16")[0], sf.read(source.with_suffix(".wav"), dtype="int16")[0]
        )


def test_a_source_that_changes_back(tmp_path, capsys):
    """Journals tell of each version, and files of equal length have one size."""
    sound, out = tmp_path / "sounds" / "a.wav", tmp_path / "out"
    sound.parent.mkdir()
    versions = []
    for number in (0, 1):
        sf.write(sound, noise(number, 1_000), 16_000)
        versions.append((sound.read_bytes(), sound.stat()))
    for number in (0, 1, 0, 0):
        sound.write_bytes(versions[number][0])
        os.utime(sound, ns=(0, versions[number][1].st_mtime_ns + number))
        assert run_prepare(capsys, sound.parent, out, "--format", "wav")[0] == 0
        np.testing.assert_array_equal(sf.read(out / "a.wav")[0], sf.read(sound)[0])


def test_a_place_that_changes_hands(tmp_path, capsys):
    sounds, out = tmp_path / "sounds", tmp_path / "out"
    sounds.mkdir()
    sf.write(sounds / "a.wav", noise(0, 1_000), 16_000)
    for other in (False, True, False):
        if other:
            sf.write(sounds / "a.flac", noise(1, 1_000), 16_000)  # comes first, and has the same length
        elif (sounds / "a.flac").exists():
            (sounds / "a.flac").unlink()
        assert run_prepare(capsys, sounds, out, "--format", "wav")[0] == 0
        listed = read_manifest(out / "manifest.csv")
        sources = read_manifest(sounds)
        for clip in range(len(sources)):
            np.testing.assert_array_equal(sf.read(listed.path(clip))[0], sf.read(sources.path(clip))[0])


def test_sources_may_go_once_they_are_prepared(sounds, tmp_path, capsys):
    source = write_list(tmp_path / "list.csv", "path", "sounds/0.wav", "sounds/2.wav", "sounds/4.wav")
    assert run_prepare(capsys, source, tmp_path / "out")[0] == 0
    before = state(tmp_path / "out")
    (sounds / "0.wav").unlink()
    (sounds / "2.wav").unlink()
    (tmp_path / "out" / "sounds" / "2.flac").unlink()
    code, printed, _ = run_prepare(capsys, source, tmp_path / "out")
    assert code == 1
    assert "written 0, there already 2, failed 1\n" in printed
    assert f"\n  {sounds / '2.wav'}: No such file or directory\n" in printed
    del before["sounds/2.flac"]
    assert state(tmp_path / "out") == before


def test_broken_clips_are_named_and_left_out(sounds, tmp_path, capsys):
    (sounds / "a empty.wav").touch()
    (sounds / "b text.flac").write_text("no sound")
    sf.write(sounds / "c nan.wav", [0.1, np.nan], 16_000, subtype="FLOAT")
    sf.write(sounds / "d cut.flac", noise(0, 200_000), 16_000)
    (sounds / "d cut.flac").write_bytes((sounds / "d cut.flac").read_bytes()[:200_000])
    (sounds / "e gone.wav").symlink_to("nowhere.wav")
    Path(os.fsdecode(os.fsencode(sounds) + b"/f \xff.wav")).write_text("no sound")
    code, printed, _ = run_prepare(capsys, sounds, tmp_path / "out", "--names", 2, workers=2)
    assert code == 1
    assert "written 6, there already 0, failed 6\n" in printed
    assert f"  {sounds / 'a empty.wav'}: cannot be read as audio (Format not recognised)\n" in printed
    assert "\n  and 4 more\n" in printed
    assert f"what failed, and why: {tmp_path / 'out' / 'failed.csv'}\n" in printed
    rows = (tmp_path / "out" / "failed.csv").read_bytes().splitlines()
    assert rows[0] == b"path,start,duration,reason"
    assert rows[3] == os.fsencode(sounds / "c nan.wav") + b",,,holds samples that are not finite"
    assert rows[6].startswith(os.fsencode(sounds) + b"/f \xff.wav,,,")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv")) == 6
    assert len(state(tmp_path / "out")) == 6


def test_clipped_samples_are_counted_and_named(tmp_path, capsys):
    (tmp_path / "sounds").mkdir()
    sound = noise(0, 48_000, peak=1.3)[:, 0]
    sf.write(tmp_path / "sounds" / "loud.wav", sound, 16_000, subtype="FLOAT")
    sf.write(tmp_path / "sounds" / "full.wav", [-1.0, 32767 / 32768, 0.0], 16_000, subtype="FLOAT")
    code, printed, _ = run_prepare(capsys, tmp_path / "sounds", tmp_path / "out")
    assert code == 0
    rounded = np.rint(sound.astype(np.float32) * 2**15)
    beyond = int(((rounded > 32767) | (rounded < -32768)).sum())
    assert beyond > 0
    assert f"clipped {beyond:,} samples of 1 clips, which went beyond full scale: " in printed
    assert (tmp_path / "out" / "clipped.csv").read_text() == f"path,clipped,samples\nloud.flac,{beyond},48000\n"
    written, _ = sf.read(tmp_path / "out" / "loud.flac", dtype="int16")
    np.testing.assert_array_equal(written, rounded.clip(-32768, 32767).astype(np.int16))
    assert (
        run_prepare(capsys, tmp_path / "sounds", tmp_path / "out")[1].count(f"clipped {beyond:,} samples") == 1
    )  # kept


def test_sound_that_is_too_long_for_wav(sounds, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conversion, "_MAX_WAV_BYTES", 2 * 4_004)
    code, printed, _ = run_prepare(capsys, sounds, tmp_path / "out", "--format", "wav")
    assert code == 1
    assert (
        f"\n  {sounds / 'sub' / '5.wav'}: lasts 6.953e-05 h, more than a WAV file can hold: take --format flac\n"
        in printed
    )
    assert run_prepare(capsys, sounds, tmp_path / "flac")[0] == 0


@pytest.mark.parametrize(
    ("make", "arguments", "error"),
    [
        ("", ["nowhere", "out"], "no such file or folder: nowhere"),
        ("", ["sounds", "sounds/out"], "sounds/out lies in sounds, where the next run would find it: take"),
        ("", ["sounds", "sounds"], "sounds lies in sounds, where the next run would find it: take"),
        ("", ["sounds", "link/out"], "link/out lies in sounds, where the next run would find it: take"),
        ("file", ["sounds", "out"], "out is a file, expected a folder"),
        ("other", ["sounds", "out"], "out holds other things (a thing), expected a new or empty folder, or one that"),
        ("run", ["sounds", "out", "--sample-rate", "8000"], "out was made with sample_rate 16000, not 8000: take an"),
        (
            "run",
            ["sounds", "out", "--format", "wav"],
            "out was made with format 'flac', not 'wav': take another",
        ),
        (
            "run",
            ["list.csv", "out"],
            "list.csv': take another folder (where it is the same list in a new place, say",
        ),
        ("settings", ["sounds", "out"], "out/prepare.json: no JSON, expected the settings of an earlier run"),
        ("list", ["sounds", "out"], "out/prepare.json: holds [], expected the settings of an earlier run"),
        ("", ["bad.csv", "out"], "none of 1 clips can be read: ./gone.wav: No such file or directory"),
    ],
)
def test_what_cannot_be_done(sounds, tmp_path, capsys, monkeypatch, make, arguments, error):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("sounds")
    write_list(Path("list.csv"), "path", "sounds/0.wav")
    write_list(Path("bad.csv"), "path", "gone.wav")
    if make == "run":
        assert run_prepare(capsys, "sounds", "out")[0] == 0
    elif make == "file":
        Path("out").touch()
    elif make:
        Path("out").mkdir()
        name, text = {"other": ("a thing", ""), "settings": ("prepare.json", "{"), "list": ("prepare.json", "[]")}[make]
        (Path("out") / name).write_text(text)
    before = sorted(path for path in Path().rglob("*") if ".prepare" not in path.parts)
    code, printed, err = run_prepare(capsys, *arguments)
    assert (code, printed) == (2, "")
    assert err.startswith("audiomae.data.prepare: error: ")
    assert err.count("\n") == 1
    assert error in err
    added = {str(path) for path in Path().rglob("*") if ".prepare" not in path.parts} - set(map(str, before))
    assert added <= {"out", "out/prepare.json"}


@pytest.mark.parametrize(
    ("flag", "value", "error"),
    [
        ("--sample-rate", 0, "sample_rate is 0, expected 1 to 655,350 Hz"),
        ("--sample-rate", 1_000_000, "sample_rate is 1000000, expected 1 to 655,350 Hz"),
        ("--names", -1, "names is -1, expected at least 0"),
    ],
)
def test_settings_that_make_no_sense(sounds, tmp_path, capsys, flag, value, error):
    code, out, err = run_prepare(capsys, sounds, tmp_path / "out", flag, value)
    assert code == 2
    assert error in out + err
    assert not (tmp_path / "out").exists()

"""The set of General MIDI instruments: its notes, its files, its splits, and that nothing leaks between them."""

import csv
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomae.data import read_manifest
from bench import instruments
from bench.general_midi import FAMILIES, INSTRUMENTS, LABELS, Note, midi_file
from bench.instruments import (
    DEFAULT_SOUNDFONT,
    HELD_OUT,
    KEYS,
    SILENT,
    VELOCITIES,
    draw_notes,
    main,
    render,
    split_programs,
)
from bench.soundfont import SoundFontError, group_by_recording, read_programs

from .soundfonts import write_general_midi

NEEDS_FLUIDSYNTH = pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="needs fluidsynth")
SHARING = [
    (0, 1, 3), (7, 81, 84, 87), (8, 80, 98), (21, 22, 23), (24, 25, 89, 93, 97, 99, 100), (27, 95, 103), (38, 86),
    (40, 110), (44, 48, 49), (50, 51, 52, 54, 76, 85, 88, 90, 91, 92, 94, 96, 101, 102), (62, 63, 83),
]  # fmt: skip
"""Programs that share recordings in FluidR3_GM.sf2: a real case, and a tight one."""


def with_singles(groups: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    grouped = {program for group in groups for program in group}
    return sorted([*groups, *((program,) for program in range(128) if program not in grouped)])


def test_the_families():
    assert len(FAMILIES) == 16
    assert {len(names) for names in FAMILIES.values()} == {8}
    assert len(set(INSTRUMENTS)) == len(LABELS) == 128
    assert [(INSTRUMENTS[p], LABELS[p]) for p in (0, 40, 73, 127)] == [
        ("Acoustic Grand Piano", "piano"), ("Violin", "strings"), ("Flute", "pipe"), ("Gunshot", "sound effects"),
    ]  # fmt: skip


@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 127), min_size=1, unique=True).map(sorted),
    st.integers(500, 10_000),
)
def test_notes_fit_the_clip_and_the_instrument(seed, keys, milliseconds):
    notes = draw_notes(np.random.default_rng(seed), keys, milliseconds)
    assert notes == draw_notes(np.random.default_rng(seed), keys, milliseconds)
    assert 1 <= len(notes) <= 8
    assert notes[0].start <= milliseconds // 10
    for note in notes:
        assert all(type(number) is int for number in note)
        assert 0 <= note.start < note.stop <= milliseconds
        assert note.key in keys
        assert note.velocity in VELOCITIES
    assert max(note.key for note in notes) - min(note.key for note in notes) <= 12


def test_clips_are_notes_chords_and_phrases_over_the_whole_range():
    generator = np.random.default_rng(0)
    clips = [draw_notes(generator, KEYS, 2575) for _ in range(600)]
    chords = [clip for clip in clips if len(clip) > 1 and len({note.start for note in clip}) == 1]
    phrases = [clip for clip in clips if len(clip) > 1 and clip not in chords]
    single = len(clips) - len(chords) - len(phrases)
    assert all(150 < count < 250 for count in (single, len(chords), len(phrases)))
    assert {len(chord) for chord in chords} == {2, 3, 4}
    assert all(len({note.key for note in chord}) == len(chord) for chord in chords)
    assert {len(phrase) for phrase in phrases} == {3, 4, 5, 6, 7, 8}
    for phrase in phrases:
        assert all(a.stop <= b.start for a, b in itertools.pairwise(phrase))
    assert {note.key for clip in clips for note in clip} == set(KEYS)


def test_a_midi_file_to_the_byte():
    assert midi_file(19, [[Note(0, 128, 60, 100)], []], slot_ms=1000, gap_ms=50) == bytes.fromhex(
        "4d546864 00000006 0000 0001 03e8"  # MThd: format 0, one track, 1000 ticks a quarter
        "4d54726b 00000021"
        "00 ff5103 0f4240  00 c013"  # a quarter is 1,000,000 us; program 19
        "00 90 3c 64  8100 80 3c 00"  # key 60 on, and off after 128 ticks
        "864f b0 78 00  8768 b0 78 00"  # all sound off after 847 more, at 975, and 1000 later
        "19 ff2f00"  # the end at 2000
    )


def read_events(data: bytes) -> list[tuple[int, bytes]]:
    """(tick, message) of a format 0 file without running status."""
    at, now, events = 22, 0, []
    while at < len(data):
        delta = 0
        while True:
            delta = delta << 7 | data[at] & 0x7F
            at += 1
            if not data[at - 1] & 0x80:
                break
        now += delta
        size = 3 + data[at + 2] if data[at] == 0xFF else 2 if data[at] >> 4 == 0xC else 3
        events.append((now, data[at : at + size]))
        at += size
    return events


@given(st.lists(st.integers(0, 2**32), max_size=5), st.integers(500, 300_000))
def test_a_midi_file_plays_every_note_at_its_time(seeds, milliseconds):
    clips = [draw_notes(np.random.default_rng(seed), KEYS, milliseconds) for seed in seeds]
    slot = milliseconds + 50
    data = midi_file(7, clips, slot, 50)
    assert int.from_bytes(data[18:22], "big") == len(data) - 22
    (_, tempo), (_, program), *events, end = read_events(data)
    assert (tempo[:3], program, end) == (b"\xff\x51\x03", b"\xc0\x07", (slot * len(clips), b"\xff\x2f\x00"))
    expected = Counter()
    for number, clip in enumerate(clips):
        for note in clip:
            expected[number * slot + note.start, bytes([0x90, note.key, note.velocity])] += 1
            expected[number * slot + note.stop, bytes([0x80, note.key, 0])] += 1
        expected[(number + 1) * slot - 25, b"\xb0\x78\x00"] += 1
    assert Counter(events) == expected
    held = Counter()  # a note that starts as another of its key stops must not be stopped with it
    for _, message in events:
        held[message[1]] += {0x90: 1, 0x80: -1}.get(message[0], 0)
        assert 0 <= held[message[1]] <= 1


@pytest.mark.skipif(not DEFAULT_SOUNDFONT.exists(), reason="needs FluidR3_GM.sf2")
def test_what_the_default_soundfont_shares():
    programs = read_programs(DEFAULT_SOUNDFONT, KEYS, VELOCITIES)
    assert group_by_recording(programs) == with_singles(SHARING)
    assert {number: program.keys[-1] for number, program in programs.items() if program.keys != tuple(KEYS)} == {
        43: 57, 58: 72, 67: 72,
    }  # fmt: skip
    pairs = [(a, b) for a, b in itertools.combinations(programs, 2) if programs[a].recordings & programs[b].recordings]
    assert (len(pairs), sum(LABELS[a] == LABELS[b] for a, b in pairs)) == (53, 21)


@given(st.integers(0, 2**62))
@settings(max_examples=30)
def test_a_split_keeps_groups_together_and_every_family_everywhere(seed):
    groups = with_singles(SHARING)
    split = split_programs(groups, seed)
    assert list(split) == ["train", "valid", "test"]
    assert sorted(program for members in split.values() for program in members) == list(range(128))
    for group in groups:
        assert any(set(group) <= set(members) for members in split.values())
    for family in FAMILIES:
        for name, wanted in HELD_OUT.items():
            assert sum(LABELS[program] == family for program in split[name]) in wanted
    assert split == split_programs(groups, seed)


def test_splits_differ_by_seed_and_hold_out_no_more_than_they_must():
    splits = [split_programs(with_singles([]), seed) for seed in range(20)]
    assert len({split["test"] for split in splits}) == 20
    assert {program for split in splits for program in split["test"]} > set(range(0, 128, 2))
    assert all((len(split["test"]), len(split["valid"])) == (32, 16) for split in splits)


def test_a_family_that_cannot_be_split_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"^no split holds out 1 to 2 for valid and 2 to 3 for test of each family's instruments with every "
        r"recording on one side: 6 instruments share some \(Pad 1 \(new age\), Pad 2 \(warm\), Pad 3 \(poly",
    ):
        split_programs(with_singles([(88, 89, 90, 91, 92, 93), (0, 1)]), 0)


class Synthesizer:
    """Stands in for fluidsynth: noise of a loudness that a test sets by program and by how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.peaks: dict[int, list[list[float]]] = {}
        self.calls = Counter()
        monkeypatch.setattr(instruments.shutil, "which", lambda name: f"/nowhere/{name}")
        monkeypatch.setattr(instruments._Renderer, "_play", self.play)

    def play(self, program: int, clips: list[list[Note]]) -> list[torch.Tensor]:
        peaks = self.peaks.get(program, [])[self.calls[program] :][:1] or [[0.5] * len(clips)]
        self.calls[program] += 1
        return [torch.linspace(-peak, peak, 8000) for peak in peaks[0]]


@pytest.fixture
def synthesizer(monkeypatch) -> Synthesizer:
    return Synthesizer(monkeypatch)


@pytest.fixture(scope="module")
def soundfont(tmp_path_factory) -> Path:
    shared = {program: group[0] for group in SHARING for program in group}
    return write_general_midi(tmp_path_factory.mktemp("soundfont") / "small.sf2", shared)


def test_a_set_is_three_manifests_of_whole_instruments(synthesizer, soundfont, tmp_path):
    made = render(tmp_path / "deep" / "set", soundfont=soundfont, clips_per_instrument=2, seed=3, seconds=0.5)
    assert made.shared == tuple(SHARING)
    assert made.programs == split_programs(with_singles(SHARING), 3)
    assert made.redrawn == 0
    for name, path in {"train": made.train, "valid": made.valid, "test": made.test}.items():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        manifest = read_manifest(path)
        assert len(manifest) == len(rows) == 2 * len(made.programs[name])
        assert {int(row["program"]) for row in rows} == set(made.programs[name])
        for number, row in enumerate(rows):
            assert manifest.labels(number) == (LABELS[int(row["program"])],)
            info = sf.info(manifest.path(number))
            assert (info.frames, info.samplerate, info.channels, info.subtype) == (8000, 16_000, 1, "PCM_16")
    assert len(list(made.folder.rglob("*.flac"))) == 256
    assert [path.name for path in made.folder.parent.iterdir()] == ["set"]


def test_silent_clips_are_drawn_anew_and_counted(synthesizer, soundfont, tmp_path):
    quiet, loud = SILENT * 0.99, SILENT * 1.01
    synthesizer.peaks = {50: [[quiet, loud, quiet], [quiet, loud], [loud]]}
    made = render(tmp_path / "set", soundfont=soundfont, clips_per_instrument=3, seed=0, seconds=0.5)
    assert made.redrawn == 3
    assert synthesizer.calls == {program: 3 if program == 50 else 1 for program in range(128)}
    assert all(np.abs(sf.read(path)[0]).max() > quiet for path in made.folder.glob("050/*.flac"))
    assert len(list(made.folder.glob("050/*.flac"))) == 3


@pytest.mark.parametrize(
    ("peaks", "message"),
    [
        ([[0.5, 0.0]] + [[0.0]] * 20, "^Violin: clip 1 was silent in each of 8 draws$"),
        ([[0.5, 1.25]], r"^Violin: clip 1 peaks at 1\.25, expected at most 1$"),
    ],
)
def test_an_instrument_that_cannot_be_used_leaves_nothing_behind(synthesizer, soundfont, tmp_path, peaks, message):
    synthesizer.peaks = {40: peaks}
    with pytest.raises(RuntimeError, match=message):
        render(tmp_path / "set", soundfont=soundfont, clips_per_instrument=2, seed=0, seconds=0.5)
    assert list(tmp_path.iterdir()) == []


def test_a_set_is_reused_by_the_same_settings_only(synthesizer, soundfont, tmp_path, monkeypatch):
    asked = {"soundfont": soundfont, "clips_per_instrument": 1, "seed": 0, "seconds": 0.5}
    (tmp_path / "set").mkdir()  # an empty folder is as good as none
    made = render(tmp_path / "set", **asked)
    monkeypatch.setattr(instruments.shutil, "which", lambda name: None)
    assert render(tmp_path / "set", **asked) == made
    assert render(tmp_path / "set", **asked | {"soundfont": tmp_path / "gone" / "small.sf2"}) == made
    assert set(synthesizer.calls.values()) == {1}

    for setting, value in {"clips_per_instrument": 2, "seed": 1, "seconds": 0.75}.items():
        message = rf"set holds a set with {setting} {asked[setting]}, not {value}: name another folder$"
        with pytest.raises(FileExistsError, match=message):
            render(tmp_path / "set", **asked | {setting: value})
    with pytest.raises(FileExistsError, match=r"soundfont small.sf2, not FluidR3_GM.sf2.*: name another folder$"):
        render(tmp_path / "set", **asked | {"soundfont": None})
    other = write_general_midi(tmp_path / "small.sf2")
    with pytest.raises(FileExistsError, match=r"with soundfont_sha256 \w{64}, not \w{64}: name another folder$"):
        render(tmp_path / "set", **asked | {"soundfont": other})


def test_what_is_missing_is_named_with_its_package(soundfont, tmp_path, monkeypatch):
    asked = {"clips_per_instrument": 1, "seed": 0, "seconds": 0.5}
    missing = tmp_path / "TimGM6mb.sf2"
    with pytest.raises(
        FileNotFoundError, match=rf"^no such soundfont: {missing}; Debian's package timgm6mb-soundfont has"
    ):
        render(tmp_path / "set", soundfont=missing, **asked)
    with pytest.raises(FileNotFoundError, match=r"^no such soundfont: nowhere\.sf2$"):
        render(tmp_path / "set", soundfont=Path("nowhere.sf2"), **asked)
    monkeypatch.setattr(instruments, "DEFAULT_SOUNDFONT", tmp_path / "FluidR3_GM.sf2")
    with pytest.raises(FileNotFoundError, match=r"package fluid-soundfont-gm has it$"):
        render(tmp_path / "set", **asked)
    monkeypatch.setattr(instruments.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"^no fluidsynth on the path; Debian's package fluidsynth has it$"):
        render(tmp_path / "set", soundfont=soundfont, **asked)


@pytest.mark.parametrize("wrong", [{"clips_per_instrument": 0}, {"seconds": 0.4}, {"seconds": float("nan")}])
def test_settings_that_make_no_sense(soundfont, tmp_path, wrong):
    asked = {"clips_per_instrument": 1, "seconds": 0.5} | wrong
    message = rf"got clips_per_instrument={asked['clips_per_instrument']} and seconds={asked['seconds']}$"
    with pytest.raises(ValueError, match=message):
        render(tmp_path / "set", soundfont=soundfont, seed=0, **asked)


def test_a_folder_of_something_else_is_left_alone(soundfont, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=rf"^{tmp_path}: not empty and without instruments.json, expected a new"):
        render(tmp_path, soundfont=soundfont, clips_per_instrument=1, seed=0, seconds=0.5)


def test_a_soundfont_without_an_instrument(synthesizer, tmp_path):
    path = write_general_midi(tmp_path / "part.sf2")
    content = bytearray(path.read_bytes())
    for program in (9, 12):  # moved to another bank
        start = content.index(b"phdr") + 8 + 38 * program
        content[start + 22] = 1
    path.write_bytes(content)
    message = r"part.sf2: no sound for 2 of 128 programs, the first 'Glockenspiel'$"
    with pytest.raises(SoundFontError, match=message):
        render(tmp_path / "set", soundfont=path, clips_per_instrument=1, seed=0, seconds=0.5)


def test_the_command(synthesizer, soundfont, tmp_path, monkeypatch, capsys):
    command = [
        "bench.instruments",
        str(tmp_path / "set"),
        "--clips",
        "1",
        "--seconds",
        "0.5",
        "--soundfont",
        str(soundfont),
    ]
    monkeypatch.setattr("sys.argv", command)
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'set'}: 128 clips, ")
    assert lines[0].endswith(" 0 drawn anew")
    assert [line.split(":")[0].strip() for line in lines[2:18]] == list(FAMILIES)
    assert lines[19:] == [f"  {', '.join(INSTRUMENTS[program] for program in group)}" for group in SHARING]
    monkeypatch.setattr("sys.argv", [*command, "--seed", "1"])
    with pytest.raises(SystemExit, match=r"^bench.instruments: .*set holds a set with seed 0, not 1"):
        main()


def test_the_record_is_readable(synthesizer, soundfont, tmp_path):
    made = render(tmp_path / "set", soundfont=soundfont, clips_per_instrument=1, seed=0, seconds=0.5)
    record = json.loads((made.folder / "instruments.json").read_text())
    assert {**record["settings"], "soundfont_sha256": ""} == {
        "soundfont": "small.sf2",
        "soundfont_sha256": "",
        "clips_per_instrument": 1,
        "seed": 0,
        "seconds": 0.5,
    }


def test_what_fluidsynth_says_is_told(soundfont, tmp_path):
    tool = tmp_path / "fluidsynth"
    renderer = instruments._Renderer(str(tool), soundfont, 1, 0, 0.5)
    for script, message in {
        "echo no such option >&2; exit 3": r"^fluidsynth failed with status 3: no such option$",
        "true": r"^fluidsynth failed with status 0: $",
    }.items():
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        with pytest.raises(RuntimeError, match=message):
            renderer._play(0, [[Note(0, 500, 60, 100)]])


@NEEDS_FLUIDSYNTH
def test_the_same_settings_give_the_same_bytes(soundfont, tmp_path):
    renderer = instruments._Renderer(shutil.which("fluidsynth"), soundfont, 4, 1, 0.5)
    written = []
    for name in ("first", "second"):
        assert renderer.render(21, KEYS, tmp_path / name / "021") == 0
        written.append([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.flac"))])
    assert len(set(written[0])) == 4
    assert written[0] == written[1]


@NEEDS_FLUIDSYNTH
def test_clips_hold_their_own_notes_only(soundfont):
    """A note that is held to the end is not heard in the next clip, and one that starts late not before."""
    renderer = instruments._Renderer(shutil.which("fluidsynth"), soundfont, 32, 0, 0.5)
    clips = [[Note(0, 500, 60, 100)], *[[]] * 30, [Note(250, 500, 72, 100)]]
    held, *nothing, late = renderer._play(16, clips)
    assert [len(clip) for clip in (held, *nothing, late)] == [8000] * 32
    assert held[-160:].abs().max() > SILENT
    assert torch.cat(nothing).abs().max() == 0
    assert late[:4000].abs().max() == 0
    assert late[4000:4160].abs().max() > SILENT  # within 10 ms
    for clip, hertz in ((held, 175), (late, 350)):
        spectrum = torch.fft.rfft(clip[-3200:] * torch.hann_window(3200)).abs()
        assert spectrum.argmax().item() * 16_000 / 3200 == hertz

"""Which recordings a soundfont's programs play, on files that are written here."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.soundfont import Program, SoundFontError, group_by_recording, read_programs

from .soundfonts import INSTRUMENT, KEYS, SAMPLE, VELOCITIES, between, write_general_midi, write_soundfont

NOISE = np.random.default_rng(0).integers(-9000, 9000, (6, 101))
ALL = range(128)


def test_zones_inherit_from_the_first_and_both_levels_limit_the_keys(tmp_path):
    path = write_soundfont(
        tmp_path / "a.sf2",
        [
            (0, 5, [{KEYS: between(40, 70)}, {INSTRUMENT: 0}, {INSTRUMENT: 1, KEYS: between(0, 10)}]),
            # A zone without an instrument that is not the first is nothing.
            (0, 9, [{INSTRUMENT: 1, KEYS: between(0, 59)}, {KEYS: between(3, 4)}, {INSTRUMENT: 1}]),
            (128, 5, [{INSTRUMENT: 2}]),
        ],
        [
            [{KEYS: between(0, 50)}, {SAMPLE: 0}, {SAMPLE: 1, KEYS: between(65, 90)},
             {SAMPLE: 2, KEYS: between(71, 71)}],
            [{SAMPLE: 3}],
            [{SAMPLE: 4}],
        ],
        NOISE,
    )  # fmt: skip
    programs = read_programs(path, ALL, range(1, 128))
    assert programs.keys() == {5, 9}
    assert programs[5].keys == (*range(11), *range(40, 51), *range(65, 71))
    assert len(programs[5].recordings) == 3
    assert programs[9] == Program(tuple(ALL), programs[5].recordings & programs[9].recordings)

    only_high = read_programs(path, range(66, 100), range(1, 128))
    assert only_high[5].keys == tuple(range(66, 71))
    assert len(only_high[5].recordings) == 1
    assert only_high[5].recordings.isdisjoint(only_high[9].recordings)


def test_a_recording_that_no_velocity_reaches_is_not_heard(tmp_path):
    soft, loud = between(0, 63), between(64, 127)
    zones = [{SAMPLE: 0, VELOCITIES: soft}, {SAMPLE: 1, VELOCITIES: loud}]
    preset = [(0, 0, [{INSTRUMENT: 0, VELOCITIES: between(50, 127)}])]
    path = write_soundfont(tmp_path / "a.sf2", preset, [zones], NOISE)
    both = read_programs(path, ALL, range(1, 128))[0]
    assert len(both.recordings) == 2
    assert len(read_programs(path, ALL, range(64, 128))[0].recordings) == 1
    assert read_programs(path, ALL, range(1, 50))[0] == Program((), frozenset())


def test_recordings_are_the_same_by_their_samples(tmp_path):
    samples = [NOISE[0], NOISE[0], NOISE[0][:-1]]
    instruments = [[{SAMPLE: number}] for number in range(3)]
    presets = [(0, number, [{INSTRUMENT: number}]) for number in range(3)]
    programs = read_programs(write_soundfont(tmp_path / "a.sf2", presets, instruments, samples), ALL, range(1, 128))
    assert group_by_recording(programs) == [(0, 1), (2,)]


@given(st.dictionaries(st.integers(0, 40), st.frozensets(st.integers(0, 30).map(lambda n: bytes([n])), max_size=3)))
def test_groups_are_the_finest_that_share_nothing(recordings):
    groups = group_by_recording({number: Program((60,), heard) for number, heard in recordings.items()})
    assert sorted(number for group in groups for number in group) == sorted(recordings)
    assert groups == sorted(tuple(sorted(group)) for group in groups)
    group_of = {number: group for group in groups for number in group}
    for group in groups:
        reached = {group[0]}
        while more := {b for a in reached for b in recordings if recordings[a] & recordings[b]} - reached:
            reached |= more
        assert reached == {number for number in recordings if group_of[number] == group}


def test_files_that_are_no_soundfont(tmp_path):
    whole = write_general_midi(tmp_path / "whole.sf2").read_bytes()
    path = tmp_path / "bad.sf2"

    def error(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(SoundFontError) as caught:
            read_programs(path, ALL, range(1, 128))
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for content in (b"", b"RIFF", b"RIFF\4\0\0\0WAVE", b"no soundfont at all"):
        assert error(content).endswith("not a SoundFont 2 file, which starts with RIFF and sfbk")
    assert error(whole[:12]).endswith("lacks the chunk smpl; it is cut off or no SoundFont 2")
    assert error(whole[:-1]).endswith("lacks the chunk phdr; it is cut off or no SoundFont 2")
    assert error(whole.replace(b"igen", b"oops")).endswith("lacks the chunk igen; it is cut off or no SoundFont 2")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_programs(tmp_path / "nowhere.sf2", ALL, range(1, 128))


@pytest.mark.parametrize(
    ("preset", "instrument", "sample_type", "message"),
    [
        ({INSTRUMENT: 3}, {SAMPLE: 0}, 1, r"malformed SoundFont \(list index out of range\)"),
        ({INSTRUMENT: 0}, {SAMPLE: 6}, 1, r"malformed SoundFont \(index 6 is out of bounds"),
        ({INSTRUMENT: 0}, {SAMPLE: 0}, 0x11, r"sample 0 is compressed or in a ROM, expected PCM in the file"),
        ({INSTRUMENT: 0}, {SAMPLE: 0}, 0x8001, r"sample 0 is compressed or in a ROM, expected PCM in the file"),
    ],
)
def test_links_that_lead_nowhere(tmp_path, preset, instrument, sample_type, message):
    path = write_soundfont(tmp_path / "bad.sf2", [(0, 0, [preset])], [[instrument]], NOISE, sample_type)
    with pytest.raises(SoundFontError, match=rf"bad.sf2: {message}"):
        read_programs(path, ALL, range(1, 128))


def test_a_sample_outside_the_file(tmp_path):
    path = write_soundfont(tmp_path / "bad.sf2", [(0, 0, [{INSTRUMENT: 0}])], [[{SAMPLE: 0}]], NOISE[:1])
    start = path.read_bytes().index(b"sample 0") + 20
    content = bytearray(path.read_bytes())
    content[start + 4 : start + 8] = (148).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(SoundFontError, match=r"malformed SoundFont \(sample 0 lies at 0 to 148 of 147\)"):
        read_programs(path, ALL, range(1, 128))

import os
from collections import Counter
from pathlib import Path

import pytest
import soundfile as sf

from audiomae.data import Manifest, ManifestError
from audiomae.data.clips import ClipError, read_clip
from audiomae.data.headers import read_header
from audiomae.data.sets import read_task

from .miniatures import COMMANDS, WORDS_V2, label_counts, link_copy, make_speech_commands, note, paths


@pytest.fixture(scope="module")
def commands_v1(tmp_path_factory) -> Path:
    return make_speech_commands(tmp_path_factory.mktemp("v1"), 1)


@pytest.fixture(scope="module")
def commands_v2(tmp_path_factory) -> Path:
    return make_speech_commands(tmp_path_factory.mktemp("v2"), 2, train=1)


def test_speech_commands_v2(commands_v2):
    base = commands_v2 / "speech_commands_v0.02"
    task = read_task("speech-commands-v2", commands_v2)
    assert task.labels.keys == task.labels.names == tuple(sorted(WORDS_V2))
    assert len(task.labels) == 35
    for split, clip in ((task.train, 2), (task.valid, 0), (task.test, 1)):
        assert label_counts(split) == dict.fromkeys(WORDS_V2, 1)
        assert set(paths(split)) == {str(base / word / f"{clip:08x}_nohash_0.wav") for word in WORDS_V2}
    assert "35 classes, clips: 35 to train on, 35 to validate on, 35 to test on" in task.notes[0]
    assert paths(read_task("speech-commands-v2", base).train) == paths(task.train)


def test_speech_commands_v1(commands_v1):
    task = read_task("speech-commands-v1", commands_v1)
    assert task.labels.keys == (*COMMANDS, "_unknown_", "_silence_")
    assert task.labels.names == (*COMMANDS, "unknown", "silence")
    # 20 other words with 2 clips to train on; words and silence half of that
    assert label_counts(task.train) == {**dict.fromkeys(COMMANDS, 20), "_unknown_": 40, "_silence_": 20}
    assert label_counts(task.valid) == {**dict.fromkeys(COMMANDS, 1), "_unknown_": 20, "_silence_": 1}
    assert label_counts(task.test) == dict.fromkeys(task.labels.keys, 1)
    assert all("speech_commands_test_set_v0.01" in path for path in paths(task.test))
    of_a_word = Counter(path for path in paths(task.train) if f"{os.sep}yes{os.sep}" in path)
    assert list(of_a_word.values()) == [10, 10]
    assert note(task, "repeated").endswith(
        "words repeated to 20 clips each, half of the 40 of other words, which are _unknown_"
    )
    assert note(task, "SUPERB").endswith("tested on speech_commands_test_set_v0.01, as SUPERB does")
    classes = task.labels.indices(task.train, single=True)
    assert classes.counts().tolist() == [20] * 10 + [40, 20]


def test_a_word_with_more_clips_than_half_of_the_unknown_ones(tmp_path, commands_v1):
    root = link_copy(commands_v1 / "speech_commands_v0.01", tmp_path / "copy")
    for clip in range(25):
        os.link(root / "yes" / "00000002_nohash_0.wav", root / "yes" / f"0000000a_nohash_{clip}.wav")
    counts = label_counts(read_task("speech-commands-v1", root).train)
    assert counts == {**dict.fromkeys(COMMANDS, 20), "yes": 27, "_unknown_": 40, "_silence_": 20}


def silence(manifest: Manifest | None) -> list[tuple[str, float]]:
    """File and place in it, as a share of its length, of each second of silence."""
    assert manifest is not None
    found = []
    for clip in range(len(manifest)):
        if manifest.labels(clip) == ("_silence_",):
            start, duration = manifest.segment(clip)
            assert duration == 1.0
            length, _ = read_header(manifest.path(clip))
            assert read_clip(manifest, clip, 16_000, 32_000).shape == (16_000,)
            found.append((Path(manifest.path(clip)).name, start / length, (start + 1) / length))
        else:
            assert manifest.segment(clip) == (0.0, None)
    return found


def test_silence_of_speech_commands_v1(tmp_path, commands_v1):
    root = link_copy(commands_v1 / "speech_commands_v0.01", tmp_path / "copy")
    tasks = [read_task("speech-commands-v1", root, seed=seed) for seed in (0, 0, 1)]
    train, again, other = (silence(task.train) for task in tasks)
    assert train == again
    assert train != other
    assert silence(tasks[0].valid) == silence(tasks[2].valid)
    assert len(set(train)) == 20
    assert {name for name, _, _ in train} == {"pink_noise.wav", "running_tap.wav"}
    shares = {"train": (0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1)}
    for split, (begin, end) in shares.items():
        for _, first, last in silence(getattr(tasks[0], split)):
            assert begin <= first < last <= end + 1e-9


def test_speech_commands_v1_without_the_official_test_set(tmp_path, commands_v1):
    base = link_copy(commands_v1 / "speech_commands_v0.01", tmp_path / "SpeechCommands" / "speech_commands_v0.01")
    task = read_task("speech-commands-v1", tmp_path)
    assert label_counts(task.test) == {**dict.fromkeys(COMMANDS, 1), "_unknown_": 20, "_silence_": 1}
    assert str(base / "yes" / "00000001_nohash_0.wav") in paths(task.test)
    assert "tested on testing_list.txt" in note(task, "not comparable with SUPERB")


def test_noise_that_silence_cannot_be_cut_from(tmp_path, commands_v1):
    root = link_copy(commands_v1 / "speech_commands_v0.01", tmp_path / "copy")
    long, short = sorted((root / "_background_noise_").iterdir())
    for path in (long, short):
        path.unlink()
        sf.write(path, [0.1] * 16_000 * 9, 16_000)
    with pytest.raises(
        ManifestError, match="no recording is long enough to cut a second for valid from, expected 12 s"
    ):
        read_task("speech-commands-v1", root)
    long.write_bytes(b"no sound")
    with pytest.raises(ClipError, match=rf"{long.name}: cannot be read as audio"):
        read_task("speech-commands-v1", root)
    for path in (long, short):
        path.unlink()
    with pytest.raises(ManifestError, match=r"copy: noise: no clips$"):
        read_task("speech-commands-v1", root)


def test_words_of_another_version(tmp_path, commands_v1, commands_v2):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "speech_commands_v0.02").symlink_to(commands_v1 / "speech_commands_v0.01")
    reason = r"lacks backward, follow, forward, learn, visual, expected the words of Speech Commands v0\.02$"
    with pytest.raises(ManifestError, match=reason):
        read_task("speech-commands-v2", tmp_path / "a")
    reason = r"also has backward, follow, forward, learn, visual, expected the words of Speech Commands v0\.01$"
    with pytest.raises(ManifestError, match=reason):
        read_task("speech-commands-v1", commands_v2 / "speech_commands_v0.02")


def test_lists_of_speech_commands(tmp_path, commands_v2):
    base = link_copy(commands_v2 / "speech_commands_v0.02", tmp_path / "copy")
    names = (base / "testing_list.txt").read_text()
    (base / "testing_list.txt").unlink()
    reason = (
        r"no validation_list\.txt and testing_list\.txt in it or in speech_commands_v0\.02, expected the unpacked arch"
    )
    with pytest.raises(ManifestError, match=reason):
        read_task("speech-commands-v2", base)
    (base / "testing_list.txt").write_text(f"{names}yes/gone_nohash_0.wav\n\n")
    task = read_task("speech-commands-v2", base)
    assert len(task.test or ()) == 35
    assert "1 of 36 (test)" in note(task, "left out")
    (base / "testing_list.txt").write_text(f"{names}gone.wav\n")
    with pytest.raises(ManifestError, match=r"testing_list\.txt: 'gone\.wav' is no clip of a word, expected 'yes/0a7c"):
        read_task("speech-commands-v2", base)

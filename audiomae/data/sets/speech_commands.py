"""Speech Commands (P. Warden 2018): version 2 with 35 words, version 1 with 10 words, silence and unknown as in SUPERB.

SUPERB (S.-w. Yang et al. 2021) tests version 1 on a separate archive, trains and validates on the lists of version 1,
and cuts silence from the recordings of noise. It draws seconds from whole recordings for training and for validation;
here the splits have different parts of each recording.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from audiomae.data.headers import read_header
from audiomae.data.labels import Labels
from audiomae.data.manifests import Clip, Manifest, ManifestError, audio_files
from audiomae.data.sets.task import Part, Request, Survey, Task, look_up, read_lines, shorten
from audiomae.seeding import epoch_generator

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
_NOISE = "_background_noise_"
# fmt: off
_WORDS_V1 = {
    *COMMANDS, "bed", "bird", "cat", "dog", "eight", "five", "four", "happy", "house", "marvin", "nine", "one", "seven",
    "sheila", "six", "three", "tree", "two", "wow", "zero",
}
# fmt: on
_WORDS_V2 = _WORDS_V1 | {"backward", "follow", "forward", "learn", "visual"}
_LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
_PUBLISHED = {
    "0.01": {"train": 51_088, "valid": 6_798, "test": 6_835},
    "0.02": {"train": 84_843, "valid": 9_981, "test": 11_005},
}
_TEST_SET = "speech_commands_test_set_v0.01"
_OFFICIAL_TEST = "official test"
_NOISE_SHARES = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}  # of each recording


def survey_v2(request: Request) -> Survey:
    """Look for the words of version 2; errors as for ``survey_v1``."""
    words = tuple(sorted(_WORDS_V2))
    base = _find_base(request.root, "0.02")
    parts, _ = _look_for_words(base, "0.02", {word: word for word in words})
    return Survey(request, Labels(words, words, source="the words of version 2"), parts, num_classes=35)


def build_v2(found: Survey) -> Task:
    """Take the splits as the lists have them.

    Raises:
        ManifestError: A split of which no clip is at hand.
    """
    note = f"split as {' and '.join(_LISTS.values())} say"
    return found.task(found.clips("train"), found.clips("valid"), found.clips("test"), [note])


def survey_v1(request: Request) -> Survey:
    """Look for the words, the recordings of noise, and the official test set of version 1.

    Raises:
        ManifestError: Another layout, words that are missing, or words of another version.
        OSError: A folder that cannot be read.
    """
    labels = {word: word if word in COMMANDS else UNKNOWN for word in _WORDS_V1}
    base = _find_base(request.root, "0.01")
    parts, noises = _look_for_words(base, "0.01", labels)
    noise = Part("noise", Manifest(((path, (SILENCE,)) for path in noises), base) if noises else None, published=6)
    folder = base.parent / _TEST_SET
    tests = audio_files(folder) if folder.is_dir() else []
    clips = Manifest(((path, (path.partition("/")[0],)) for path in tests), folder) if tests else None
    keys = (*COMMANDS, UNKNOWN, SILENCE)
    return Survey(
        request,
        Labels(keys, tuple(key.strip("_") for key in keys), source="the classes of version 1"),
        (*parts, noise, Part(_OFFICIAL_TEST, clips, published=3_081)),
        num_classes=12,
    )


def build_v1(found: Survey) -> Task:
    """Add silence, repeat the words to half as often as the unknown ones, and test on the official test set.

    Raises:
        ManifestError: A split of which no clip is at hand, or too little noise.
        OSError: Noise that cannot be read.
    """
    noises = [(noise, read_header(noise)[0]) for noise in _paths(found.clips("noise"))]
    train, valid = found.clips("train"), found.clips("valid")
    counts = _count(train)
    target = counts[UNKNOWN] // 2
    drawn = epoch_generator(found.request.seed, 0, "silence").random(max(target, 1))
    train = Manifest.join([_repeat(train, target), _silence(noises, "train", drawn)])
    seconds_of_valid = _mean_word(valid)
    valid = Manifest.join([valid, _silence(noises, "valid", _spread(seconds_of_valid))])
    notes = [
        f"words repeated to {target:,} clips each, half of the {counts[UNKNOWN]:,} of other words, which are {UNKNOWN}",
        f"{SILENCE} is cut from {len(noises)} recordings of noise: {len(drawn):,} seconds drawn from the first 80% of "
        f"each to train on, {seconds_of_valid} from the next 10% to validate on",
    ]
    official = next(part for part in found.parts if part.name == _OFFICIAL_TEST)
    if official.manifest is not None:
        return found.task(train, valid, official.manifest, [*notes, f"tested on {_TEST_SET}, as SUPERB does"])
    test = found.clips("test")
    test = Manifest.join([test, _silence(noises, "test", _spread(_mean_word(test)))])
    notes.append(
        f"no {_TEST_SET} beside the words: tested on {_LISTS['test']} and on {SILENCE} from the last 10% of the noise, "
        "which is not comparable with SUPERB"
    )
    return found.task(train, valid, test, notes)


def _find_base(root: Path, version: str) -> Path:
    name = f"speech_commands_v{version}"
    for base in (root, root / name, root / "SpeechCommands" / name):
        if all((base / list_name).is_file() for list_name in _LISTS.values()):
            return base
    raise ManifestError(
        f"{root}: no {' and '.join(_LISTS.values())} in it or in {name}, expected the unpacked archive {name}.tar.gz"
    )


def _look_for_words(base: Path, version: str, labels: dict[str, str]) -> tuple[tuple[Part, ...], list[str]]:
    """Look for the clips of each split, labelled by word; also return the recordings of noise."""
    files = audio_files(base)
    noises = [path for path in files if path.startswith(f"{_NOISE}/")]
    clips = [path for path in files if not path.startswith(f"{_NOISE}/")]
    found = {path.partition("/")[0] for path in clips}
    if found != labels.keys():
        what, words = ("lacks", labels.keys() - found) if labels.keys() - found else ("also has", found - labels.keys())
        raise ManifestError(
            f"{base}: {what} {shorten(sorted(words))}, expected the words of Speech Commands v{version}"
        )
    at_hand = {path: path for path in clips}
    lists = {part: _read_list(base / name, labels.keys()) for part, name in _LISTS.items()}
    held_out = {name for names in lists.values() for name in names}
    lists = {"train": [path for path in clips if path not in held_out], **lists}
    parts = tuple(
        look_up(
            part,
            ((name, (labels[name.partition("/")[0]],)) for name in names),
            at_hand,
            base,
            _PUBLISHED[version][part],
        )
        for part, names in lists.items()
    )
    return parts, noises


def _read_list(path: Path, words: Collection[str]) -> list[str]:
    names = [line.strip() for line in read_lines(path) if line.strip()]
    for name in names:
        if name.partition("/")[0] not in words:
            raise ManifestError(
                f"{path}: {name!r} is no clip of a word, expected 'yes/0a7c2a8d_nohash_0.wav' or the like"
            )
    return names


def _paths(manifest: Manifest) -> list[str]:
    return [manifest.path(clip) for clip in range(len(manifest))]


def _count(manifest: Manifest) -> Counter[str]:
    return Counter(manifest.labels(clip)[0] for clip in range(len(manifest)))


def _mean_word(manifest: Manifest) -> int:
    """How many clips a command has in the mean, at least 1."""
    counts = _count(manifest)
    return max(round(sum(counts[word] for word in COMMANDS) / len(COMMANDS)), 1)


def _repeat(manifest: Manifest, target: int) -> Manifest:
    """Go round the clips of each class until it has ``target``; none is dropped where it has more."""
    clips: dict[str, list[int]] = {}
    for clip in range(len(manifest)):
        clips.setdefault(manifest.labels(clip)[0], []).append(clip)
    return manifest.select(
        numbers[i % len(numbers)] for numbers in clips.values() for i in range(max(target, len(numbers)))
    )


def _spread(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


def _silence(noises: Sequence[tuple[str, float]], split: str, places: np.ndarray) -> Manifest:
    """Cut seconds of silence.

    Args:
        noises: Path and length, in seconds, of the recordings.
        split: Whose part of each recording they come from.
        places: (seconds of silence,), where each starts: 0 is the beginning of the first recording's part, 1 the end
            of the last one's.
    """
    begin, end = _NOISE_SHARES[split]
    parts = [(path, begin * length, (end - begin) * length - 1) for path, length in noises]
    parts = [(path, first, room) for path, first, room in parts if room > 0]
    if not parts:
        raise ManifestError(f"{_NOISE}: no recording is long enough to cut a second for {split} from, expected 12 s")
    ends = np.cumsum([room for _, _, room in parts])
    clips: list[Clip] = []
    for place in places * ends[-1]:
        which = min(int(np.searchsorted(ends, place, side="right")), len(parts) - 1)
        path, first, room = parts[which]
        clips.append((path, (SILENCE,), float(first + place - (ends[which] - room)), 1.0))
    return Manifest(clips, root="")

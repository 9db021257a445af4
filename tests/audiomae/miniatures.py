"""Miniature copies of the published data sets: their true layouts and sample rates, with generated sound.

Each function writes below the folder it is given and returns what ``read_task`` takes as its root. A clip is a tone
whose pitch belongs to its class, in some noise, so that a small model can learn to tell classes apart. The functions
at the end copy a miniature and look at what was read.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import soundfile as sf

from audiomae.data import Manifest
from audiomae.data.sets import Task

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
# fmt: off
WORDS_V1 = (
    *COMMANDS, "bed", "bird", "cat", "dog", "eight", "five", "four", "happy", "house", "marvin", "nine", "one", "seven",
    "sheila", "six", "three", "tree", "two", "wow", "zero",
)
# fmt: on
WORDS_V2 = (*WORDS_V1, "backward", "follow", "forward", "learn", "visual")
ESC50_CLASSES = ("dog", "rooster", "pig", "door_wood_knock")
AUDIOSET_CLASSES = (
    ("/m/09x0r", "Speech"),
    ("/m/05zppz", "Male speech, man speaking"),
    ("/m/0jbk", "Animal"),
    ("/m/04rlf", "Music"),
    ("/t/dd00004", "Male singing"),
)


def write_tone(path: Path, pitch: int, *, seconds: float, sample_rate: int, seed: int = 0) -> None:
    """Write a tone of the given class in noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    frequency = 200 * 2 ** (pitch % 12 / 3)
    sound = 0.3 * np.sin(2 * np.pi * (frequency * time + draw.random()))
    sf.write(path, sound + 0.02 * draw.standard_normal(len(time)), sample_rate)


def make_esc50(
    root: Path, *, classes: Sequence[str] = ESC50_CLASSES, folds: Sequence[int] = (1, 2, 3, 4, 5), seconds: float = 1.0
) -> Path:
    """Make ESC-50 with a clip of each class in each fold, 44.1 kHz."""
    (root / "meta").mkdir(parents=True)
    with (root / "meta" / "esc50.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
        for number, (fold, (target, category)) in enumerate(product(folds, enumerate(classes))):
            name = f"{fold}-{100_000 + number}-A-{target}.wav"
            rows.writerow([name, fold, target, category, False, 100_000 + number, "A"])
            write_tone(root / "audio" / name, target, seconds=seconds, sample_rate=44_100, seed=number)
    return root


def make_speech_commands(root: Path, version: int, *, train: int = 2, seconds: float = 0.3) -> Path:
    """Make Speech Commands 1 or 2 with ``train`` clips of each word, and one to validate and to test on, 16 kHz.

    The folder speech_commands_v0.0N lies below the root, version 1 with the official test set beside it.
    """
    base = root / f"speech_commands_v0.0{version}"
    lists: dict[str, list[str]] = {"validation_list.txt": [], "testing_list.txt": []}
    for number, word in enumerate(WORDS_V1 if version == 1 else WORDS_V2):
        names = [f"{word}/{clip:08x}_nohash_0.wav" for clip in range(train + 2)]
        for clip, name in enumerate(names):
            write_tone(base / name, number, seconds=seconds, sample_rate=16_000, seed=clip)
        lists["validation_list.txt"].append(names[0])
        lists["testing_list.txt"].append(names[1])
    for name, listed in lists.items():
        (base / name).write_text("\n".join(listed) + "\n")
    for number, name in enumerate(("pink_noise", "running_tap")):
        path = base / "_background_noise_" / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).standard_normal(16_000 * (15 + 5 * number))
        sf.write(path, 0.05 * noise, 16_000)
    if version == 1:
        for number, label in enumerate((*COMMANDS, "_unknown_", "_silence_")):
            path = root / "speech_commands_test_set_v0.01" / label / "0a0b0c0d_nohash_0.wav"
            write_tone(path, number, seconds=seconds, sample_rate=16_000, seed=9)
    return root


def make_voxceleb1(root: Path, *, speakers: int = 3, train: int = 2, seconds: float = 1.0, below: str = "wav") -> Path:
    """Make VoxCeleb1 with ``train`` utterances of each speaker, and one to validate and to test on, 16 kHz."""
    lines = []
    for speaker in range(speakers):
        for utterance, split in enumerate([*[1] * train, 2, 3]):
            name = f"id1{speaker + 1:04d}/video_{split}-xyz/{utterance + 1:05d}.wav"
            lines.append(f"{split} {name}")
            write_tone(root / below / name, speaker, seconds=seconds, sample_rate=16_000, seed=utterance)
    (root / "iden_split.txt").write_text("\n".join(lines) + "\n")
    return root


def make_audioset(
    root: Path,
    *,
    layout: str = "segments",
    train: int = 6,
    unbalanced: int = 6,
    evaluation: int = 5,
    seconds: float = 1.0,
) -> Path:
    """Make AudioSet with clips of one and two labels, 32 kHz FLAC.

    Args:
        root: Where to.
        layout: "segments" has the official lists of segments and files by id; "json" the manifests of Audio-MAE.
        train: Balanced clips.
        unbalanced: Unbalanced clips.
        evaluation: Evaluation clips.
        seconds: Length of the clips.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "class_labels_indices.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["index", "mid", "display_name"])
        rows.writerows((i, mid, name) for i, (mid, name) in enumerate(AUDIOSET_CLASSES))
    records: dict[str, list[dict[str, str]]] = {}
    number = 0
    for part, clips in (("balanced_train", train), ("unbalanced_train", unbalanced), ("eval", evaluation)):
        records[part], lines = [], []
        for clip in range(clips):
            video = f"-{part[:4]}_{number:05d}"
            wanted = [number % len(AUDIOSET_CLASSES), *([(number + 1) % len(AUDIOSET_CLASSES)] if clip % 2 else [])]
            labels = ",".join(AUDIOSET_CLASSES[i][0] for i in wanted)
            name = (f"{video}.flac", f"Y{video}.flac", f"{video}_{30 * clip}.000_{30 * clip + 10}.000.flac")[clip % 3]
            write_tone(root / part / name, wanted[0], seconds=seconds, sample_rate=32_000, seed=number)
            lines.append(f'{video}, {30 * clip}.000, {30 * clip + 10}.000, "{labels}"')
            records[part].append({"wav": str(root / part / name), "labels": labels})
            number += 1
        if layout == "segments":
            header = ["# Segments csv created Sun Mar  5 10:54:31 2017", f"# num_ytids={clips}, num_segs={clips}"]
            header.append("# YTID, start_seconds, end_seconds, positive_labels")
            (root / f"{part}_segments.csv").write_text("\n".join([*header, *lines]) + "\n")
    if layout == "json":
        manifests = {
            "train.json": records["balanced_train"],
            "train_all.json": records["balanced_train"] + records["unbalanced_train"],
            "eval_19k.json": records["eval"],
        }
        for name, data in manifests.items():
            (root / name).write_text(json.dumps({"data": data}))
    return root


def make_manifest(
    root: Path, *, classes: Sequence[str] = ("bell", "horn"), clips: int = 3, seconds: float = 0.5
) -> Path:
    """Make train.csv, valid.csv and test.csv with ``clips`` clips of each class, 16 kHz; return the first."""
    for split in ("train", "valid", "test"):
        lines = ["path,label"]
        for (number, label), clip in product(enumerate(classes), range(clips)):
            name = f"{split}/{label}_{clip}.wav"
            write_tone(root / name, 5 * number, seconds=seconds, sample_rate=16_000, seed=clip)
            lines.append(f"{name},{label}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root / "train.csv"


def make_class_folders(
    root: Path, *, classes: Sequence[str] = ("bell", "horn"), clips: int = 3, seconds: float = 0.5
) -> Path:
    """Make a folder for each class with ``clips`` clips, 16 kHz."""
    for (number, label), clip in product(enumerate(classes), range(clips)):
        write_tone(root / label / f"{clip}.wav", 5 * number, seconds=seconds, sample_rate=16_000, seed=clip)
    return root


def link_copy(source: Path, target: Path) -> Path:
    """Copy a miniature so that files can be added and removed: new folders, the same files."""
    for parent, _, files in os.walk(source):
        folder = target / Path(parent).relative_to(source)
        folder.mkdir(parents=True)
        for name in files:
            os.link(Path(parent, name), folder / name)
    return target


def paths(manifest: Manifest | None) -> list[str]:
    """Paths of all clips."""
    assert manifest is not None
    return [manifest.path(clip) for clip in range(len(manifest))]


def label_counts(manifest: Manifest | None) -> dict[str, int]:
    """Clips of each label."""
    assert manifest is not None
    return dict(Counter(label for clip in range(len(manifest)) for label in manifest.labels(clip)))


def note(task: Task, text: str) -> str:
    """The one note of a task that holds a text."""
    (found,) = [line for line in task.notes if text in line]
    assert found.startswith(f"{task.name}: ")
    assert "\n" not in found
    return found

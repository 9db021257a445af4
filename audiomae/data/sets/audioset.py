"""AudioSet: two million clips of 10 s of YouTube videos, 527 classes (J. F. Gemmeke et al. 2017).

Two layouts: manifests as AST and Audio-MAE have them, which list what is at hand, and the official lists of segments
with files of any folders below, which are found by the video's id in their names.
"""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path

from audiomae.data.labels import read_labels
from audiomae.data.manifests import Manifest, ManifestError, audio_files, read_manifest
from audiomae.data.sets.task import Part, Request, Survey, Task, look_up

_LABELS = "class_labels_indices.csv"
_FOLDERS = ("", "metadata", "data", "datafiles", "data/datafiles")  # where lists lie, below the root

# Part: (name of the official list, its segments, names of the manifests of AST and of Audio-MAE)
_BALANCED, _UNBALANCED, _FULL, _EVAL = "balanced", "unbalanced", "train", "eval"
_SEGMENTS = {
    _BALANCED: ("balanced_train_segments.csv", 22_160),
    _UNBALANCED: ("unbalanced_train_segments.csv", 2_041_789),
    _EVAL: ("eval_segments.csv", 20_371),
}
_MANIFESTS = {
    _BALANCED: ("balanced_train_data.json", "balanced_train_data_type1_2_mean.json", "train.json"),
    _FULL: ("whole_train_data.json", "train_all.json"),
    _EVAL: ("eval_data.json", "eval_19k.json"),
}

# Downloaders name a file <id>, Y<id>, or either with the segment behind: <id>_30, <id>_30.000_40.000, <id>_30000_40000.
_FILE_NAME = re.compile(r"Y?([\w-]{11})(?:_\d.*)?", re.ASCII)


def survey(request: Request) -> Survey:
    """Look for the clips of the lists that a request needs.

    Raises:
        FileNotFoundError: No such manifest or label file.
        ManifestError: Neither layout in the folder, no label file, a malformed list, or one that names a file outside
            its folder.
        OSError: A folder that cannot be read.
    """
    balanced_alone = request.name == "audioset-20k"
    train = _BALANCED if balanced_alone else _FULL
    if request.root.is_dir():
        folders = [request.root / folder for folder in _FOLDERS]
        manifest = _find(folders, _MANIFESTS[train])
    else:
        folders, manifest = [request.root.parent, request.root.parent.parent], request.root
    notes: list[str] = []
    if manifest is not None:
        evaluation = request.test or _find(folders, _MANIFESTS[_EVAL])
        if evaluation is None:
            raise ManifestError(f"{request.root}: no {' or '.join(_MANIFESTS[_EVAL])}, expected one to test on")
        parts = [_as_listed(train, manifest, request), _as_listed(_EVAL, evaluation, request)]
    else:
        names = [_BALANCED] if balanced_alone else [_BALANCED, _UNBALANCED]
        lists = {part: _find(folders, (_SEGMENTS[part][0],)) for part in names + [_EVAL] * (request.test is None)}
        parts, notes = _look_for_segments(request.root, lists, _MANIFESTS[train])
        if request.test is not None:
            parts.append(_as_listed(_EVAL, request.test, request))
    if request.valid is not None:
        parts.append(_as_listed("valid", request.valid, request))
    labels = request.labels or _find(folders, (_LABELS,))
    if labels is None:
        raise ManifestError(f"{request.root}: no {_LABELS}, expected AudioSet's list of classes")
    return Survey(request, read_labels(labels), tuple(parts), num_classes=527, notes=tuple(notes))


def _find(folders: list[Path], names: tuple[str, ...]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _as_listed(part: str, path: Path, request: Request) -> Part:
    return Part(part, read_manifest(path, allow_outside=request.allow_outside), looked_for=False)


def _look_for_segments(
    root: Path, lists: dict[str, Path | None], manifests: tuple[str, ...]
) -> tuple[list[Part], list[str]]:
    """Look for the files of official lists anywhere below the root; also return notes on files that were passed over.

    An id stands in one segment of one list, so it says all about a file.
    """
    for part, path in lists.items():
        if path is None:
            raise ManifestError(
                f"{root}: neither AudioSet's {_SEGMENTS[part][0]} nor a manifest {' or '.join(manifests)}"
            )
    files = audio_files(root)
    at_hand: dict[str, str] = {}
    unnamed = 0
    for file in files:
        name = _FILE_NAME.fullmatch(os.path.splitext(os.path.basename(file))[0])
        if name:
            at_hand.setdefault(name[1], file)
        else:
            unnamed += 1
    notes = []
    if unnamed:
        notes.append(f"sound files whose names are no video's id, passed over: {unnamed:,}")
    copies = len(files) - unnamed - len(at_hand)
    if copies:
        notes.append(f"sound files with the id of another one, passed over: {copies:,}")
    parts = [
        look_up(part, _read_segments(path), at_hand, root, _SEGMENTS[part][1])
        for part, path in lists.items()
        if path is not None
    ]
    return parts, notes


def _read_segments(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the video's id and the labels of each segment."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, strict=True, skipinitialspace=True)
        try:
            for row in rows:
                if not row or row[0].startswith("#"):
                    continue
                if len(row) != 4:
                    raise ManifestError(
                        f"{path}: line {rows.line_num}: {len(row)} fields, expected id, start, end and quoted labels"
                    )
                yield row[0], row[3].split(",")
        except csv.Error as error:
            raise ManifestError(f"{path}: line {rows.line_num}: {error}") from error
        except UnicodeError as error:
            raise ManifestError(f"{path}: {error}") from error


def build(found: Survey) -> Task:
    """Train on what the name of the data set says, and test on the evaluation clips.

    Raises:
        ManifestError: A list of which no clip is at hand.
    """
    train = [found.clips(part.name) for part in found.parts if part.name in (_BALANCED, _UNBALANCED, _FULL)]
    valid = found.clips("valid") if found.request.valid else None
    notes = [*found.notes, "tested on the evaluation clips"]
    if valid is None:
        notes.append("there is no validation split")
    return found.task(Manifest.join(train), valid, found.clips(_EVAL), notes)

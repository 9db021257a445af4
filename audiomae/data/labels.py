"""Classes: their order, their names, and those of each clip."""

import difflib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from audiomae.data.manifests import Manifest, ManifestError, csv_records

_CSV_COLUMNS = ("index", "mid", "display_name")
_LONGEST = (
    100  # of labels in messages, and of those that are worth a hint: difflib takes minutes for two lines of 100 kB
)


class LabelError(ManifestError):
    """Labels that cannot be used; the message names them and where they stand."""


class ClassIds:
    """The classes of each clip, in two flat buffers that worker processes share.

    ``ids[clip]`` is (classes of the clip,) int64, without duplicates.

    Args:
        ends: (clips,) int64: ids before the end of each clip.
        ids: (ids of all clips,) int64.
        num_classes: How many classes there are.
    """

    def __init__(self, ends: np.ndarray, ids: np.ndarray, num_classes: int):
        self._offsets = np.concatenate([np.zeros(1, np.int64), ends])
        self._ids = ids
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, clip: int) -> np.ndarray:
        clip = range(len(self))[clip]
        return self._ids[self._offsets[clip] : self._offsets[clip + 1]]

    def counts(self) -> np.ndarray:
        """Clips of each class, (classes,) int64."""
        return np.bincount(self._ids, minlength=self.num_classes)


@dataclass(frozen=True)
class Labels:
    """The classes of a data set, in the order of a model's outputs.

    Attributes:
        keys: What manifests hold, as "/m/09x0r".
        names: What people read, as "Speech"; equal to the keys where a data set has one name for each.
        source: Where they come from, for messages.

    Raises:
        LabelError: For no classes, a key that stands twice, or another number of names than of keys.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    source: str = field(default="the labels", compare=False)

    def __post_init__(self) -> None:
        """Check that they are classes."""
        if not self.keys:
            raise LabelError(f"no labels in {self.source}")
        if len(self.names) != len(self.keys):
            raise LabelError(f"{len(self.names)} names for {len(self.keys)} labels in {self.source}")
        if len(self._index) < len(self.keys):
            twice = next(key for i, key in enumerate(self.keys) if self._index[key] != i)
            raise LabelError(f"label {_shown(twice)} stands twice in {self.source}")

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {key: i for i, key in enumerate(self.keys)}

    def index(self, key: str) -> int:
        """Give the class of a label.

        Raises:
            LabelError: For a label that is not among them; names one that is close.
        """
        try:
            return self._index[key]
        except KeyError:
            raise LabelError(f"label {_shown(key)} is not in {self.source}{self._hint(key)}") from None

    def _hint(self, key: str) -> str:
        for name, known in zip(self.names, self.keys, strict=True):
            if name == key:
                return f", where {_shown(name)} has the key {_shown(known)}"
        if len(key) > _LONGEST:
            return ""
        close = difflib.get_close_matches(key, [known for known in self.keys if len(known) <= _LONGEST], n=1)
        return f"; did you mean {close[0]!r}?" if close else ""

    def indices(self, manifest: Manifest, *, single: bool = False) -> ClassIds:
        """Look up the classes of all clips.

        Args:
            manifest: The clips.
            single: A clip must be of one class alone.

        Raises:
            LabelError: For a clip without label, one whose label is not among these, or, with ``single``, one with
                several; names the clip.
        """
        ends, ids = array("q"), array("q")
        for clip in range(len(manifest)):
            labels = manifest.labels(clip)
            try:
                found = dict.fromkeys(map(self.index, labels))
            except LabelError as error:
                raise LabelError(f"{_place(manifest, clip)}: {error}") from None
            if not found:
                raise LabelError(f"{_place(manifest, clip)}: has no label")
            if single and len(found) > 1:
                raise LabelError(f"{_place(manifest, clip)}: has {len(found)} labels, expected one")
            ids.extend(found)
            ends.append(len(ids))
        return ClassIds(np.frombuffer(ends, np.int64), np.frombuffer(ids, np.int64), len(self))

    @classmethod
    def of(cls, *manifests: Manifest) -> "Labels":
        """Take all labels that clips have, sorted.

        Raises:
            LabelError: For clips without any label.
        """
        keys = tuple(sorted({label for manifest in manifests for label in labels_found(manifest)}))
        if not keys:
            raise LabelError("the clips have no labels")
        return cls(keys, keys, source="the labels of these clips")


def labels_found(manifest: Manifest) -> set[str]:
    """The labels that the clips of a manifest have."""
    return set(chain.from_iterable(map(manifest.labels, range(len(manifest)))))


def _shown(label: str) -> str:
    return repr(label) if len(label) <= _LONGEST else f"{label[:_LONGEST]!r}..."


def _place(manifest: Manifest, clip: int) -> str:
    return f"clip {clip} ({manifest.path(clip)})"


def read_labels(path: str | Path) -> Labels:
    """Read the classes from a file.

    - A ``.csv`` as AudioSet's ``class_labels_indices.csv``: columns ``index``, ``mid`` and ``display_name``, the
      indices 0, 1, 2, ... in order. The mids are the keys.
    - A ``.txt``: one name a line.

    Raises:
        FileNotFoundError: For no such file.
        LabelError: For a file of another kind, without labels, with one that stands twice, or malformed; names the
            place.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such label file: {path}")
    readers = {".csv": _read_csv, ".txt": _read_txt}
    if path.suffix.lower() not in readers or not path.is_file():
        raise LabelError(f"{path}: a label file is a .csv or a .txt")
    try:
        keys, names = readers[path.suffix.lower()](path)
    except (ManifestError, UnicodeError) as error:
        raise LabelError(f"{path}: {error}") from error
    return Labels(tuple(keys), tuple(names), source=str(path))


def _read_csv(path: Path) -> tuple[Sequence[str], Sequence[str]]:
    keys, names = [], []
    for number, (line, row) in enumerate(csv_records(path, *((column,) for column in _CSV_COLUMNS))):
        index, key, name = (row[column] for column in _CSV_COLUMNS)
        if index != str(number):
            raise LabelError(f"line {line}: index is {_shown(index)}, expected {number}")
        if not key or not name:
            raise LabelError(f"line {line}: mid is {_shown(key)} and display_name {_shown(name)}, expected both")
        keys.append(key)
        names.append(name)
    return keys, names


def _read_txt(path: Path) -> tuple[Sequence[str], Sequence[str]]:
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    if "" in names:
        raise LabelError(f"line {names.index('') + 1}: is empty, expected a name")
    return names, names

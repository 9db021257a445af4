"""Lists of clips: the embedded demo clips, a folder, a CSV, or the JSON of AST and Audio-MAE."""

import csv
import hashlib
import json
import math
import os
import reprlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import soundfile as sf

Clip = tuple[str, Sequence[str]] | tuple[str, Sequence[str], float, float | None]
"""(path, labels), or (path, labels, start, duration) of a part of a file, in seconds; no duration is to its end."""

_Inside = Callable[[str], bool]
_PATH_COLUMNS = ("path", "file", "filename", "wav")
_LABEL_SEPARATOR = "\x1f"  # inside a manifest only; no label may hold it
_WHOLE_FILE = array("d", [0.0, math.inf])  # start and duration
_LONGEST_SHOWN = 200  # characters of a path in a message
_MAX_SECONDS = 1e9  # 32 years
_ALIASES = {
    "AIFF": ("aif", "aifc"),
    "AU": ("snd",),
    "MP3": ("mp2",),
    "NIST": ("sph",),
    "OGG": ("oga", "opus"),
    "WAV": ("wave",),
}


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names it and the row."""


class _PackedStrings:
    """Strings in two flat buffers: millions take little, and worker processes share them without copying a page."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("q", [0])

    def append(self, string: str) -> None:
        """Append one string; file names that are not UTF-8 survive."""
        self._data += string.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")

    @property
    def buffers(self) -> "tuple[bytearray, array[int]]":
        """All strings, one after the other, and where each ends, after a 0."""
        return self._data, self._ends


class Manifest:
    """Clips and their labels, in a form that holds millions and that worker processes share.

    Args:
        clips: (path, labels) of each clip, or (path, labels, start, duration) of one that is a part of a file, in
            seconds, to the end of the file where the duration is None; duplicates stay.
        root: Folder that relative paths start from.

    Raises:
        ManifestError: For no clips, a path that is empty or cannot be a path, a label with the character U+001F, or a
            part that cannot be one.
    """

    def __init__(self, clips: Iterable[Clip], root: str | Path = "."):
        self.root = str(root)
        self._paths = _PackedStrings()
        self._labels = _PackedStrings()
        self._segments: array[float] | None = None  # start and duration of each clip, if any is a part of a file
        self.has_labels = False
        for number, clip in enumerate(clips):
            path, labels, start, duration = clip if len(clip) == 4 else (*clip, 0.0, None)
            if not path or "\0" in path:
                raise ManifestError(f"clip {number}: {_shown(path)} is no path")
            self._append_segment(number, start, duration)
            self._paths.append(path)
            joined = _LABEL_SEPARATOR.join(labels)
            if joined.count(_LABEL_SEPARATOR) >= max(len(labels), 1):
                raise ManifestError(
                    f"clip {number}: labels {reprlib.repr(list(labels))}, expected none with {_LABEL_SEPARATOR!r}"
                )
            self._labels.append(joined)
            self.has_labels |= bool(labels)
        if not self._paths:
            raise ManifestError("no clips")

    def _append_segment(self, number: int, start: float, duration: float | None) -> None:
        if not 0 <= start <= _MAX_SECONDS:
            raise ManifestError(f"clip {number}: start is {start} s, expected at least 0 and at most {_MAX_SECONDS:g}")
        if duration is not None and not 0 < duration <= _MAX_SECONDS:
            raise ManifestError(
                f"clip {number}: duration is {duration} s, expected more than 0 and at most {_MAX_SECONDS:g}"
            )
        if self._segments is None:
            if start == 0 and duration is None:
                return
            self._segments = _WHOLE_FILE * number
        self._segments.extend((start, math.inf if duration is None else duration))

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, clip: int) -> str:
        """Path of a clip, ``root`` included."""
        return os.path.join(self.root, self._paths[clip])

    def labels(self, clip: int) -> tuple[str, ...]:
        """Labels of a clip; none where the manifest gives none."""
        labels = self._labels[clip]
        return tuple(labels.split(_LABEL_SEPARATOR)) if labels else ()

    def segment(self, clip: int) -> tuple[float, float | None]:
        """Which part of its file a clip is: start and duration in seconds, (0.0, None) for the whole file."""
        clip = range(len(self))[clip]
        if self._segments is None:
            return 0.0, None
        start, duration = self._segments[2 * clip : 2 * clip + 2]
        return start, None if duration == math.inf else duration

    def fingerprint(self) -> str:
        """Hash of clips, labels and their order, in hexadecimal digits; it does not depend on ``root``."""
        digest = hashlib.sha256()
        for buffer in (*self._paths.buffers, *self._labels.buffers, self._segments or b""):
            digest.update(buffer)
        return digest.hexdigest()

    def select(self, clips: Iterable[int]) -> "Manifest":
        """Make a manifest of some of the clips, in the order given; a clip can be taken more than once."""
        return Manifest(((self._paths[clip], self.labels(clip), *self.segment(clip)) for clip in clips), self.root)

    @classmethod
    def join(cls, manifests: Sequence["Manifest"]) -> "Manifest":
        """Make a manifest of the clips of several, one after the other."""
        if len(manifests) == 1:
            return manifests[0]
        roots = {manifest.root for manifest in manifests}
        return cls(
            (
                (manifest._paths[clip] if len(roots) == 1 else manifest.path(clip), labels, *manifest.segment(clip))
                for manifest in manifests
                for clip, labels in enumerate(map(manifest.labels, range(len(manifest))))
            ),
            root=roots.pop() if len(roots) == 1 else "",
        )


def audio_extensions() -> tuple[str, ...]:
    """Extensions, without dot and in lower case, that mark the audio files of a folder: those that libsndfile reads."""
    formats = sf.available_formats().keys() - {"RAW"}
    aliases = (alias for name in formats for alias in _ALIASES.get(name, ()))
    return tuple(sorted({*map(str.lower, formats), *aliases}))


def read_manifest(source: str | Path | None = None, *, allow_outside: bool = False) -> Manifest:
    """Read the list of clips from one of these; no clip is opened or looked for.

    - ``None``: the demo clips that come with the package.
    - A folder: all audio files in it and its sub-folders, by extension, sorted by path; hidden ones are skipped. No
      labels.
    - A ``.csv``: a header with a column ``path``, ``file``, ``filename`` or ``wav``, and, where clips have labels,
      ``label`` (one, as it stands) or ``labels`` (separated by commas). ``start`` and ``duration``, in seconds, make
      a clip a part of its file; either may be empty. Relative paths start from the CSV's folder.
    - A ``.json`` of AST or Audio-MAE: ``{"data": [{"wav": path, "labels": "/m/a,/m/b"}, ...]}``, the labels optional.
      Relative paths start from the JSON's folder.

    Args:
        source: Where the list is.
        allow_outside: Whether paths in a CSV or JSON may lie outside its folder, by their names: an absolute one, or
            one with "..". Links are not followed to find out.

    Raises:
        FileNotFoundError: For no such file or folder.
        ManifestError: For a source of another kind, without clips, or malformed, or a path that lies outside; names the
            place.
        OSError: For a file or folder that cannot be read.
    """
    if source is None:
        return _read(Path(str(resources.files("audiomae.data") / "demo" / "clips.csv")), _csv_clips)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    readers = {".csv": _csv_clips, ".json": _json_clips}
    if path.suffix.lower() not in readers or not path.is_file():  # a pipe could be read only once
        raise ManifestError(f"{path}: a manifest is a folder, a .csv or a .json")
    return _read(path, readers[path.suffix.lower()], allow_outside)


def _read(path: Path, clips: Callable[[Path, _Inside], Iterator[Clip]], allow_outside: bool = False) -> Manifest:
    try:
        return Manifest(clips(path, _anywhere if allow_outside else _inside(path.parent)), root=path.parent)
    except ValueError as error:  # also of a file that is not UTF-8, and a number of thousands of digits
        raise ManifestError(f"{path}: {error}") from error


def _anywhere(path: str) -> bool:
    return True


def _inside(folder: Path) -> _Inside:
    """Make a function that tells whether a path, relative to a folder or absolute, names something in it."""
    root = os.path.join(os.path.abspath(folder), "")

    def is_inside(path: str) -> bool:
        if ".." not in path and (not path.startswith("/") or path.startswith(root)):
            return True  # millions of paths need no second look
        return os.path.join(os.path.normpath(os.path.join(root, path)), "").startswith(root)

    return is_inside


def _shown(path: str) -> str:
    return repr(path) if len(path) <= _LONGEST_SHOWN else f"{path[:_LONGEST_SHOWN]!r}..."


def _lies_outside(path: str) -> str:
    return f"{_shown(path)} lies outside the folder of the list; --allow-outside (allow_outside=True) allows it"


def _read_folder(folder: Path) -> Manifest:
    paths = audio_files(folder)
    if not paths:
        raise ManifestError(f"{folder}: no audio files in it or below; looked for .{' .'.join(audio_extensions())}")
    return Manifest(((path, ()) for path in paths), root=folder)


def audio_files(folder: Path) -> list[str]:
    """Find all audio files in a folder and its sub-folders, by extension; hidden ones are skipped.

    Returns:
        Paths relative to the folder, sorted.

    Raises:
        OSError: For a folder that is missing or cannot be read.
    """
    endings = tuple(f".{extension}" for extension in audio_extensions())
    paths = []
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        inside = os.path.relpath(parent, folder)
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_loop(folder, inside, name)]
        names = (name for name in files if not name.startswith(".") and name.lower().endswith(endings))
        paths += [os.path.normpath(os.path.join(inside, name)) for name in names]
    return sorted(paths)


def _raise(error: OSError) -> None:
    raise error


def _is_loop(folder: Path, inside: str, name: str) -> bool:
    """Whether a sub-folder is a link to a folder on the way to it, or to one that such a folder lies in."""
    parent = folder / inside
    if not (parent / name).is_symlink():
        return False
    target = os.path.realpath(parent / name)
    on_the_way = [parent, *(folder / above for above in Path(inside).parents)]
    return any(Path(os.path.realpath(above)).is_relative_to(target) for above in on_the_way)


def _csv_clips(path: Path, is_inside: _Inside) -> Iterator[Clip]:
    for line, record in csv_records(path, _PATH_COLUMNS):
        clip = record[next(name for name in _PATH_COLUMNS if name in record)]
        if not is_inside(clip):
            raise ManifestError(f"line {line}: {_lies_outside(clip)}")
        if "labels" in record:
            labels = _split(record["labels"])
        else:
            labels = [record["label"]] if record.get("label") else []
        start, duration = (_seconds(record, name, line) for name in ("start", "duration"))
        yield clip, labels, start or 0.0, duration


def csv_records(path: Path, *columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number and the fields of each row of a CSV with a header.

    Args:
        path: The file.
        columns: Each is a choice of names of which the header must hold one.

    Raises:
        ManifestError: For a malformed CSV, without its path.
        UnicodeError: For one that is not UTF-8.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            for choice in columns:
                if not set(choice) & set(header):
                    raise ManifestError(f"expected a column {' or '.join(choice)}, found {reprlib.repr(header)}")
            for row in filter(None, rows):
                if len(row) != len(header):
                    raise ManifestError(f"line {rows.line_num}: {len(row)} fields under a header of {len(header)}")
                yield rows.line_num, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ManifestError(f"line {rows.line_num}: {error}") from error


def _seconds(record: dict[str, str], column: str, line: int) -> float | None:
    text = record.get(column, "").strip()
    try:
        return float(text) if text else None
    except ValueError as error:
        raise ManifestError(f"line {line}: {column} is {reprlib.repr(text)}, expected seconds") from error


def _json_clips(path: Path, is_inside: _Inside) -> Iterator[Clip]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ManifestError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
        except RecursionError as error:
            raise ManifestError('expected {"data": [...]}, found brackets in brackets without end') from error
    records = content.get("data") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise ManifestError(f'expected {{"data": [...]}}, found {reprlib.repr(content)}')
    labelled = any(isinstance(record, dict) and "labels" in record for record in records)
    for number, record in enumerate(records):
        for key in ("wav", "labels") if labelled else ("wav",):
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise ManifestError(f'data[{number}]: expected a string "{key}", found {reprlib.repr(record)}')
        if not is_inside(record["wav"]):
            raise ManifestError(f"data[{number}]: {_lies_outside(record['wav'])}")
        yield record["wav"], _split(record["labels"]) if labelled else []


def _split(labels: str) -> list[str]:
    return [label.strip() for label in labels.split(",") if label.strip()]

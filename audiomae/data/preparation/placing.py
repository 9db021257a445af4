"""Where the clips of a manifest go in a folder of their own: names that are safe, stable and different."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import count

import numpy as np

from audiomae.data.manifests import Manifest

Segment = tuple[float, float | None]

OUTSIDE = "outside"
"""Folder of what lies outside of the manifest's folder."""
_WHOLE: Segment = (0.0, None)
_MAX_NAME = 255  # bytes of a name that file systems take


def stable_hash(text: str) -> int:
    """Hash text, as a path, to 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


class Places:
    """Where each clip goes: ``places[clip]`` is a path relative to the output folder, inside of it, and valid UTF-8.

    A clip keeps its path below the manifest's folder, with another extension. One from elsewhere goes below
    ``outside/``, with its whole path. A part of a file has its start and end, in seconds, in its name. Where two
    sources would share a path, as ``a.wav`` and ``a.mp3`` do, the first one in the manifest gets it, and the others
    keep their extension too: ``a.mp3.flac``. Clips that are the same part of the same file share a place.

    Two numbers a clip are kept, whatever its path.

    Args:
        manifest: The clips.
        extension: What names end in, with its dot.
        reserved: Names in the output folder that are not to be used.

    Attributes:
        first: ``(clips,)`` int64, the first clip that is the same sound.
        file: ``(clips,)`` int64, the first clip of the same file.
    """

    def __init__(self, manifest: Manifest, extension: str, reserved: Iterable[str]):
        self._manifest, self._extension, self._reserved = manifest, extension, frozenset(reserved)
        self._root = os.path.join(os.path.abspath(manifest.root), "")
        clips = len(manifest)
        names, sources, files = (np.empty(clips, np.uint64) for _ in range(3))
        folders = {stable_hash("")}
        for clip in range(clips):
            below_root, folder, name = self._split(clip)
            segment = manifest.segment(clip)
            names[clip] = stable_hash(self._place(folder, os.path.splitext(name)[0], segment))
            files[clip] = stable_hash(below_root + name)
            sources[clip] = files[clip] if segment == _WHOLE else stable_hash(_source(below_root, name, segment))
            parent = folder.rstrip("/")
            while (number := stable_hash(parent)) not in folders:
                folders.add(number)
                parent = parent.rpartition("/")[0]
        self.first, self.file = _first_alike(sources), _first_alike(files)
        self._others = self._rename(names, np.fromiter(folders, np.uint64, len(folders)))

    def __getitem__(self, clip: int) -> str:
        first = int(self.first[clip])
        return self._others.get(first) or self._plain(first)

    def source(self, clip: int) -> str:
        """Name what a clip is made from; it stays the same where the manifest moves with its clips."""
        below_root, _, name = self._split(clip)
        return _source(below_root, name, self._manifest.segment(clip))

    def hashes(self) -> np.ndarray:
        """Hash all places, (clips,) uint64, sorted."""
        return np.sort(np.fromiter((stable_hash(self[clip]) for clip in range(len(self.first))), np.uint64))

    def _split(self, clip: int) -> tuple[str, str, str]:
        """Folder of a clip, below the manifest's or absolute; the folder that it goes to; its name."""
        folder, name = os.path.split(self._manifest.path(clip))
        if name in (os.curdir, os.pardir):
            folder, name = os.path.split(os.path.join(folder, name, ""))
        return *_place_folder(folder, self._root, self._reserved), name

    def _plain(self, clip: int) -> str:
        """Where a clip would go if it were the only one."""
        _, folder, name = self._split(clip)
        return self._place(folder, os.path.splitext(name)[0], self._manifest.segment(clip))

    def _place(self, folder: str, stem: str, segment: Segment) -> str:
        start, duration = segment
        if segment != _WHOLE:
            stem += f"_{start:.3f}_" + ("end" if duration is None else f"{start + duration:.3f}")
        return folder + _fit(_as_text(stem), self._extension)

    def _rename(self, names: np.ndarray, folders: np.ndarray) -> dict[int, str]:
        """Find other places for those whose own is that of an earlier one, or of a folder."""
        own = np.flatnonzero(self.first == np.arange(len(names)))
        clashing = (_first_alike(names[own]) != np.arange(len(own))) | np.isin(names[own], folders)
        taken = np.union1d(names, folders)
        others: dict[int, str] = {}
        given: set[int] = set()
        for clip in own[clashing].tolist():
            for place in self._alternatives(clip):
                number = stable_hash(place)
                if number not in given and not is_among(taken, number):
                    others[clip] = place
                    given.add(number)
                    break
        return others

    def _alternatives(self, clip: int) -> Iterator[str]:
        _, folder, name = self._split(clip)
        segment = self._manifest.segment(clip)
        yield self._place(folder, name, segment)
        for number in count(2):
            yield self._place(folder, f"{name}-{number}", segment)


def _source(below_root: str, name: str, segment: Segment) -> str:
    return "\0".join([below_root + name, *map(repr, segment)])


@lru_cache(maxsize=4096)
def _place_folder(folder: str, root: str, reserved: frozenset[str]) -> tuple[str, str]:
    """Folder of clips, below the root or absolute, and the one that they go to; both end in "/" or are empty."""
    below = (os.path.abspath(folder).rstrip("/") + "/").removeprefix(root)
    path = below
    if path.startswith("/") or path.split("/", 1)[0] in reserved:
        path = os.path.join(OUTSIDE, os.path.join(root, path).lstrip("/"))
    return below, "/".join(_fit(_as_text(part)) for part in path.split("/"))


def _first_alike(hashes: np.ndarray) -> np.ndarray:
    """For each number, where it stands first."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


def is_among(numbers: np.ndarray, number: int) -> bool:
    """Whether a number is among sorted ones."""
    place = np.searchsorted(numbers, np.uint64(number))
    return bool(place < len(numbers) and numbers[place] == number)


def _as_text(name: str) -> str:
    """Write the bytes of a name that are not UTF-8 as ``%FF``: no list of paths could hold them."""
    if name.isascii():
        return name
    return "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in name)


def _fit(name: str, extension: str = "") -> str:
    """Shorten a name that is too long with its extension; a hash of the whole keeps it different from others."""
    if len(name.encode()) + len(extension) > _MAX_NAME:
        kept = name.encode()[: _MAX_NAME - len(extension) - 17].decode(errors="ignore")
        name = f"{kept}-{stable_hash(name):016x}"
    return name + extension

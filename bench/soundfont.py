"""Which recordings the programs of a SoundFont 2 file play, read from the file alone.

Layout and generator numbers: SoundFont Technical Specification 2.04, sections 7 and 8. A preset's zones name
instruments, an instrument's zones name samples, and both are limited to ranges of keys and velocities.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

_KEY_RANGE, _VELOCITY_RANGE, _INSTRUMENT, _SAMPLE = 43, 44, 41, 53
_NOT_PCM_HERE = 0x8010  # bits of a sample's type: in a ROM, or compressed


def _record(size: int, **offsets: tuple[int, str]) -> np.dtype:
    """Those fields of a record that are read: name to (offset, format)."""
    return np.dtype(
        {
            "names": list(offsets),
            "offsets": [offset for offset, _ in offsets.values()],
            "formats": [kind for _, kind in offsets.values()],
            "itemsize": size,
        }
    )


_BAG = _record(4, generator=(0, "<u2"))
_GENERATOR = _record(4, operator=(0, "<u2"), amount=(2, "<u2"))
_RECORDS = {
    "phdr": _record(38, program=(20, "<u2"), bank=(22, "<u2"), bag=(24, "<u2")),
    "pbag": _BAG,
    "pgen": _GENERATOR,
    "inst": _record(22, bag=(20, "<u2")),
    "ibag": _BAG,
    "igen": _GENERATOR,
    "shdr": _record(46, start=(20, "<u4"), end=(24, "<u4"), kind=(44, "<u2")),
}


class SoundFontError(ValueError):
    """A file that is no SoundFont 2 with its samples inside; the message names it and the reason."""


@dataclass(frozen=True)
class Program:
    """What one program plays.

    Attributes:
        keys: Keys that sound, ascending.
        recordings: Digests of the samples that they sound: equal where the samples are equal, whatever their names.
    """

    keys: tuple[int, ...]
    recordings: frozenset[bytes]


def read_programs(path: Path, keys: range, velocities: range) -> dict[int, Program]:
    """Read what notes of some keys and velocities sound, for each program of bank 0.

    Args:
        path: A SoundFont 2 file.
        keys: Keys of the notes, MIDI numbers in [0, 128).
        velocities: Their velocities, in [1, 128).

    Raises:
        FileNotFoundError: For no such file.
        SoundFontError: For a file of another kind, malformed, or with samples that are compressed or elsewhere.
    """
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    if bytes(data[:4]) != b"RIFF" or bytes(data[8:12]) != b"sfbk":
        raise SoundFontError(f"{path}: not a SoundFont 2 file, which starts with RIFF and sfbk")
    chunks = {
        name: chunk
        for kind, outer in _chunks(data[12:])
        if kind == "LIST"
        for name, chunk in _chunks(outer[4:])  # after the list's own name
    }
    missing = [name for name in ("smpl", *_RECORDS) if name not in chunks]
    if missing:
        raise SoundFontError(f"{path}: lacks the chunk {missing[0]}; it is cut off or no SoundFont 2")
    try:
        records = {name: np.frombuffer(chunks[name], dtype) for name, dtype in _RECORDS.items()}
        return _read_programs(chunks["smpl"], records, keys, velocities)
    except SoundFontError as error:
        raise SoundFontError(f"{path}: {error}") from error
    except (IndexError, KeyError, ValueError) as error:
        raise SoundFontError(f"{path}: malformed SoundFont ({error})") from error


def group_by_recording(programs: Mapping[int, Program]) -> list[tuple[int, ...]]:
    """The finest groups of programs such that no recording is played by two of them, in ascending order."""
    groups: list[tuple[set[int], set[bytes]]] = []
    for number, program in programs.items():
        members, recordings = {number}, set(program.recordings)
        apart = []
        for group in groups:
            if group[1].isdisjoint(program.recordings):
                apart.append(group)
            else:
                members |= group[0]
                recordings |= group[1]
        groups = [*apart, (members, recordings)]
    return sorted(tuple(sorted(members)) for members, _ in groups)


def _chunks(data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, content) of each RIFF chunk; one that is cut off is left out."""
    start = 0
    while start + 8 <= len(data):
        size = int.from_bytes(bytes(data[start + 4 : start + 8]), "little")
        content = data[start + 8 : start + 8 + size]
        if len(content) == size:
            yield bytes(data[start : start + 4]).decode("latin-1"), content
        start += 8 + size + size % 2


def _read_programs(
    samples: np.ndarray, records: Mapping[str, np.ndarray], keys: range, velocities: range
) -> dict[int, Program]:
    digests: dict[int, bytes] = {}

    def digest(sample: int) -> bytes:
        if sample not in digests:
            start, end, kind = records["shdr"][:-1][sample].tolist()  # the last record only ends the list
            if kind & _NOT_PCM_HERE:
                raise SoundFontError(f"sample {sample} is compressed or in a ROM, expected PCM in the file")
            if not 2 * start < 2 * end <= len(samples):
                raise ValueError(f"sample {sample} lies at {start} to {end} of {len(samples) // 2}")
            digests[sample] = hashlib.blake2b(samples[2 * start : 2 * end].tobytes(), digest_size=16).digest()
        return digests[sample]

    preset_zones = _Zones(records["pbag"], records["pgen"], _INSTRUMENT)
    instrument_zones = _Zones(records["ibag"], records["igen"], _SAMPLE)
    instrument_bags = records["inst"]["bag"].tolist()
    programs = {}
    for (number, bank, bag), (_, _, end) in pairwise(records["phdr"].tolist()):
        if bank != 0:
            continue
        sounding: set[int] = set()
        recordings = set()
        for outer in preset_zones.between(bag, end):
            instrument = outer[_INSTRUMENT]
            for inner in instrument_zones.between(instrument_bags[instrument], instrument_bags[instrument + 1]):
                zone_keys = _common(keys, _KEY_RANGE, (outer, inner))
                if zone_keys and _common(velocities, _VELOCITY_RANGE, (outer, inner)):
                    sounding.update(zone_keys)
                    recordings.add(digest(inner[_SAMPLE]))
        programs[number] = Program(tuple(sorted(sounding)), frozenset(recordings))
    return programs


class _Zones:
    """The zones of presets or of instruments, each as its generators: operator to amount.

    A first zone without the terminal operator holds what the zones after it inherit; others without it count for
    nothing.
    """

    def __init__(self, bags: np.ndarray, generators: np.ndarray, terminal: int):
        self._starts: list[int] = bags["generator"].tolist()
        self._generators: Sequence[tuple[int, int]] = generators.tolist()
        self._terminal = terminal

    def between(self, first: int, end: int) -> Iterator[dict[int, int]]:
        inherited: dict[int, int] = {}
        for bag in range(first, end):
            zone = dict(self._generators[self._starts[bag] : self._starts[bag + 1]])
            if self._terminal in zone:
                yield inherited | zone
            elif bag == first:
                inherited = zone


def _common(limits: range, operator: int, zones: Collection[Mapping[int, int]]) -> range:
    """The part of ``limits`` inside the ranges that zones set; a zone that sets none has all."""
    ranges = [zone[operator] for zone in zones if operator in zone]  # lowest value, then highest, a byte each
    low = max([limits.start, *(amount & 0xFF for amount in ranges)])
    return range(low, min([limits.stop, *((amount >> 8) + 1 for amount in ranges)]))

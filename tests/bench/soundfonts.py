"""Small SoundFont 2 files, written by the specification and independently of what reads them."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

KEYS, VELOCITIES, INSTRUMENT, SAMPLE = 43, 44, 41, 53
LOOP, PLAY_LOOPED = 54, 1
RELEASE, FOUR_SECONDS = 38, 2400

Zone = dict[int, int]  # generator to amount


def between(low: int, high: int) -> int:
    """Amount of a range generator."""
    return low | high << 8


def write_soundfont(
    path: Path,
    presets: Sequence[tuple[int, int, Sequence[Zone]]],
    instruments: Sequence[Sequence[Zone]],
    samples: Sequence[np.ndarray],
    sample_type: int = 1,
) -> Path:
    """Write a SoundFont 2.01.

    Args:
        path: The file.
        presets: (bank, program, zones) of each.
        instruments: Zones of each.
        samples: int16 samples of each at 44.1 kHz, which sound as they are at key 60; a loop leaves out 8 at both ends.
        sample_type: Of all samples; 1 is mono.
    """
    pool, headers, at = b"", b"", 0
    for number, sample in enumerate(samples):
        pool += sample.astype("<i2").tobytes() + bytes(2 * 46)
        end = at + len(sample)
        name = f"sample {number}".encode()
        headers += struct.pack("<20sIIIIIBbHH", name, at, end, at + 8, end - 8, 44_100, 60, 0, 0, sample_type)
        at = end + 46
    headers += struct.pack("<20s26x", b"EOS")

    preset_bags, preset_generators, preset_starts = zones([zones for _, _, zones in presets])
    instrument_bags, instrument_generators, instrument_starts = zones(instruments)
    preset_headers = b"".join(
        struct.pack("<20sHHHIII", b"preset", program, bank, start, 0, 0, 0)
        for (bank, program, _), start in zip(presets, preset_starts, strict=False)
    )
    preset_headers += struct.pack("<20sHHHIII", b"EOP", 0, 0, preset_starts[-1], 0, 0, 0)
    instrument_headers = b"".join(struct.pack("<20sH", b"instrument", start) for start in instrument_starts)
    content = b"sfbk"
    content += chunk(b"LIST", b"INFO" + chunk(b"ifil", struct.pack("<HH", 2, 1)) + chunk(b"isng", b"EMU8000\0"))
    content += chunk(b"LIST", b"sdta" + chunk(b"smpl", pool))
    content += chunk(
        b"LIST",
        b"pdta"
        + chunk(b"phdr", preset_headers)
        + chunk(b"pbag", preset_bags)
        + chunk(b"pmod", bytes(10))
        + chunk(b"pgen", preset_generators)
        + chunk(b"inst", instrument_headers)
        + chunk(b"ibag", instrument_bags)
        + chunk(b"imod", bytes(10))
        + chunk(b"igen", instrument_generators)
        + chunk(b"shdr", headers),
    )
    path.write_bytes(chunk(b"RIFF", content))
    return path


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def zones(owners: Sequence[Sequence[Zone]]) -> tuple[bytes, bytes, list[int]]:
    """Bags and generators of all zones, and each owner's first bag, with one more at the end."""
    bags, generators, starts, written, count = b"", b"", [], 0, 0
    for owner in owners:
        starts.append(count)
        for zone in owner:
            bags += struct.pack("<HH", written, 0)
            # A range comes first and the link to what is below last, wherever they stand in the dictionary.
            for generator, amount in sorted(zone.items(), key=lambda g: (g[0] in (INSTRUMENT, SAMPLE), g[0] != KEYS)):
                generators += struct.pack("<HH", generator, amount)
                written += 1
            count += 1
    return bags + struct.pack("<HH", written, 0), generators + bytes(4), [*starts, count]


def write_general_midi(path: Path, shared: dict[int, int] | None = None) -> Path:
    """Write a soundfont of 128 programs with a tone each, their own or that of the program that ``shared`` names.

    The tone of program p is a multiple of 175 Hz at key 60, 1 + p % 16 times that. Its release takes 4 s.
    """
    time = np.arange(1024) / 44_100
    samples = [8000 * np.sin(2 * np.pi * 175 * (1 + program % 16) * time) + program for program in range(128)]
    tone = {LOOP: PLAY_LOOPED, RELEASE: FOUR_SECONDS}
    instruments = [[tone | {SAMPLE: (shared or {}).get(program, program)}] for program in range(128)]
    return write_soundfont(path, [(0, p, [{INSTRUMENT: p}]) for p in range(128)], instruments, samples)

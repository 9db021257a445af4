"""General MIDI's instruments, and Standard MIDI Files that play them.

Names and numbers: General MIDI System Level 1; files: Standard MIDI Files 1.0.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

FAMILIES = {
    "piano": (
        "Acoustic Grand Piano", "Bright Acoustic Piano", "Electric Grand Piano", "Honky-tonk Piano",
        "Electric Piano 1", "Electric Piano 2", "Harpsichord", "Clavi",
    ),
    "chromatic percussion": (
        "Celesta", "Glockenspiel", "Music Box", "Vibraphone", "Marimba", "Xylophone", "Tubular Bells", "Dulcimer",
    ),
    "organ": (
        "Drawbar Organ", "Percussive Organ", "Rock Organ", "Church Organ", "Reed Organ", "Accordion", "Harmonica",
        "Tango Accordion",
    ),
    "guitar": (
        "Acoustic Guitar (nylon)", "Acoustic Guitar (steel)", "Electric Guitar (jazz)", "Electric Guitar (clean)",
        "Electric Guitar (muted)", "Overdriven Guitar", "Distortion Guitar", "Guitar Harmonics",
    ),
    "bass": (
        "Acoustic Bass", "Electric Bass (finger)", "Electric Bass (pick)", "Fretless Bass", "Slap Bass 1",
        "Slap Bass 2", "Synth Bass 1", "Synth Bass 2",
    ),
    "strings": (
        "Violin", "Viola", "Cello", "Contrabass", "Tremolo Strings", "Pizzicato Strings", "Orchestral Harp", "Timpani",
    ),
    "ensemble": (
        "String Ensemble 1", "String Ensemble 2", "Synth Strings 1", "Synth Strings 2", "Choir Aahs", "Voice Oohs",
        "Synth Voice", "Orchestra Hit",
    ),
    "brass": (
        "Trumpet", "Trombone", "Tuba", "Muted Trumpet", "French Horn", "Brass Section", "Synth Brass 1",
        "Synth Brass 2",
    ),
    "reed": ("Soprano Sax", "Alto Sax", "Tenor Sax", "Baritone Sax", "Oboe", "English Horn", "Bassoon", "Clarinet"),
    "pipe": ("Piccolo", "Flute", "Recorder", "Pan Flute", "Blown Bottle", "Shakuhachi", "Whistle", "Ocarina"),
    "synth lead": (
        "Lead 1 (square)", "Lead 2 (sawtooth)", "Lead 3 (calliope)", "Lead 4 (chiff)", "Lead 5 (charang)",
        "Lead 6 (voice)", "Lead 7 (fifths)", "Lead 8 (bass + lead)",
    ),
    "synth pad": (
        "Pad 1 (new age)", "Pad 2 (warm)", "Pad 3 (polysynth)", "Pad 4 (choir)", "Pad 5 (bowed)", "Pad 6 (metallic)",
        "Pad 7 (halo)", "Pad 8 (sweep)",
    ),
    "synth effects": (
        "FX 1 (rain)", "FX 2 (soundtrack)", "FX 3 (crystal)", "FX 4 (atmosphere)", "FX 5 (brightness)",
        "FX 6 (goblins)", "FX 7 (echoes)", "FX 8 (sci-fi)",
    ),
    "ethnic": ("Sitar", "Banjo", "Shamisen", "Koto", "Kalimba", "Bagpipe", "Fiddle", "Shanai"),
    "percussive": (
        "Tinkle Bell", "Agogo", "Steel Drums", "Woodblock", "Taiko Drum", "Melodic Tom", "Synth Drum",
        "Reverse Cymbal",
    ),
    "sound effects": (
        "Guitar Fret Noise", "Breath Noise", "Seashore", "Bird Tweet", "Telephone Ring", "Helicopter", "Applause",
        "Gunshot",
    ),
}  # fmt: skip
"""General MIDI's families, each with its eight programs in the order of their numbers from 0."""

INSTRUMENTS = tuple(name for names in FAMILIES.values() for name in names)
LABELS = tuple(family for family, names in FAMILIES.items() for _ in names)
"""The family of each program."""


class Note(NamedTuple):
    """A note, in milliseconds from the clip's start, MIDI key and velocity."""

    start: int
    stop: int
    key: int
    velocity: int


def midi_file(program: int, clips: Iterable[Sequence[Note]], slot_ms: int, gap_ms: int) -> bytes:
    """A Standard MIDI File, format 0, of one program that plays clips at a fixed spacing.

    A tick is a millisecond: 1000 a quarter note, which lasts a second. In the middle of the gap that ends a slot, all
    sound is cut off, so that nothing of a clip is heard in the next.

    Args:
        program: Number from 0.
        clips: Notes of each clip, within its slot.
        slot_ms: From the start of a clip to that of the next, milliseconds.
        gap_ms: Of these, what lies between the clips.
    """
    events = []
    end = 0
    for notes in clips:
        for note in notes:
            events.append((end + note.start, bytes([0x90, note.key, note.velocity])))
            events.append((end + note.stop, bytes([0x80, note.key, 0])))
        end += slot_ms
        events.append((end - gap_ms // 2, bytes([0xB0, 120, 0])))
    track = bytearray(b"\0\xff\x51\x03" + (1_000_000).to_bytes(3, "big") + bytes([0, 0xC0, program]))
    now = 0
    for tick, message in [*sorted(events), (end, b"\xff\x2f\0")]:  # at one tick, a note ends before the next starts
        track += _variable_length(tick - now) + message
        now = tick
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 1000) + b"MTrk" + struct.pack(">I", len(track)) + track


def _variable_length(number: int) -> bytes:
    """A number in groups of seven bits, the highest first; all bytes but the last have the eighth bit set."""
    groups = [number & 0x7F]
    while number := number >> 7:
        groups.append(number & 0x7F | 0x80)
    return bytes(reversed(groups))

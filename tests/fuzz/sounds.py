"""Sound files: one of every kind that libsndfile writes, with fields of their headers overwritten; and RIFF by hand."""

import struct
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile as sf
from hypothesis import strategies as st

from .edits import Edit, edited, edits, interesting, seldom, sometimes

RECORDED = {
    # SD2 is two files.
    **{name: (name, None) for name in sorted(sf.available_formats()) if name not in ("RAW", "SD2")},
    **{
        f"{name} {subtype}": (name, subtype)
        for name, subtypes in {
            "WAV": (
                "PCM_U8",
                "PCM_24",
                "PCM_32",
                "FLOAT",
                "DOUBLE",
                "ULAW",
                "IMA_ADPCM",
                "MS_ADPCM",
                "GSM610",
            ),
            "AIFF": ("PCM_S8", "FLOAT", "ULAW", "IMA_ADPCM"),
            "AU": ("FLOAT", "G721_32"),
            "CAF": ("ALAC_16", "FLOAT"),
            "FLAC": ("PCM_24",),
            "OGG": ("OPUS",),
            "RF64": ("FLOAT",),
            "W64": ("IMA_ADPCM",),
        }.items()
        for subtype in subtypes
    },
}
"""Format and subtype of each recorded file; None is the format's own subtype."""

# (what stands before a field, bits from there to the field, bits of the field, byte order)
Field = tuple[bytes, int, int, str]
_RIFF_FMT = [(32, 16), (48, 16), (64, 32), (96, 32), (128, 16), (144, 16)]
FIELDS: dict[str, list[Field]] = {
    "WAV": [
        *((b"fmt ", at + 32, bits, "little") for at, bits in _RIFF_FMT),
        *((name, 32, 32, "little") for name in (b"RIFF", b"fmt ", b"data", b"fact")),
        *((b"fact", 64, 32, "little"), (b"data", 64, 64, "little")),
    ],
    "RF64": [*((b"ds64", at, 64, "little") for at in (64, 128, 192)), (b"ds64", 256, 32, "little")],
    "FLAC": [
        (b"fLaC", at, bits, "big")
        for at, bits in (
            (32, 8),
            (40, 24),
            (64, 16),
            (80, 16),
            (96, 24),
            (120, 24),
            (144, 20),
            (164, 3),
            (167, 5),
            (172, 36),
        )
    ],
    "OGG": [
        *((b"\x01vorbis", at, bits, "little") for at, bits in ((56, 32), (88, 8), (96, 32), (128, 32), (224, 8))),
        *(
            (b"OpusHead", at, bits, "little")
            for at, bits in ((64, 8), (72, 8), (80, 16), (96, 32), (128, 16), (144, 8))
        ),
        *((b"OggS", at, bits, "little") for at, bits in ((32, 8), (40, 8), (48, 64), (112, 32), (144, 32), (208, 8))),
    ],
    "MP3": [
        *((name, at, 32, "big") for name in (b"Xing", b"Info") for at in (32, 64, 96)),
        *((b"\xff\xfb", at, bits, "big") for at, bits in ((11, 2), (13, 2), (16, 4), (20, 2), (22, 1), (24, 2))),
    ],
    "AIFF": [
        *((b"COMM", at, bits, "big") for at, bits in ((32, 32), (64, 16), (80, 32), (112, 16), (128, 16), (144, 64))),
        *((b"SSND", at, 32, "big") for at in (32, 64, 96)),
        (b"FORM", 32, 32, "big"),
    ],
    "AU": [(b".snd", at, 32, "big") for at in range(32, 192, 32)],
    "CAF": [
        *(
            (b"desc", at, bits, "big")
            for at, bits in ((32, 64), (96, 64), (160, 32), (224, 32), (256, 32), (288, 32), (320, 32))
        ),
        *((name, at, 64, "big") for name in (b"data", b"pakt", b"kuki") for at in (32, 96, 160)),
    ],
}


@cache
def recorded(name: str) -> bytes:
    """A valid file: a quarter of a second, in stereo at 44.1 kHz where its kind can."""
    kind, subtype = RECORDED[name]
    sound = 0.3 * np.random.default_rng(0).standard_normal((12_000, 2)).cumsum(axis=0) / 100
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sound")
        # HTK and SDS keep a sample's length in whole units, of which 44.1 kHz is none.
        first = (16_000, 1) if kind in ("HTK", "SDS") else (44_100, 2)
        for rate, channels in (first, (44_100, 1), (48_000, 2), (16_000, 1), (8_000, 1)):
            try:
                sf.write(path, np.clip(sound[: rate // 4, :channels], -1, 1), rate, format=kind, subtype=subtype)
                return path.read_bytes()
            except (sf.LibsndfileError, ValueError):
                continue
    raise ValueError(f"libsndfile writes no {name}")


@dataclass(frozen=True)
class Recorded:
    """A file of some kind, with other values in fields of its header, and edited."""

    name: str
    fields: tuple[tuple[int, int], ...] = ()
    edits: tuple[Edit, ...] = ()

    def data(self) -> bytes:
        """The bytes of the file."""
        data = recorded(self.name)
        known = FIELDS.get(self.name.split()[0], FIELDS["WAV"])
        for number, value in self.fields:
            data = _with_field(data, known[number % len(known)], value)
        return _with_checksums(edited(data, self.edits))


def _with_field(data: bytes, field: Field, value: int) -> bytes:
    marker, at, bits, order = field
    found = data.find(marker)
    first, last = (8 * found + at) // 8, -(-(8 * found + at + bits) // 8)
    if found < 0 or last > len(data):
        return data
    after = 8 * last - (8 * found + at + bits)
    old = int.from_bytes(data[first:last], order)
    mask = (1 << bits) - 1 << after
    new = old & ~mask | (value << after) & mask
    return data[:first] + new.to_bytes(last - first, order) + data[last:]


def _with_checksums(data: bytes) -> bytes:
    """Set the checksums of Ogg pages, without which nothing else in them is looked at."""
    if not data.startswith(b"OggS"):
        return data
    content, at = bytearray(data), 0
    while content[at : at + 4] == b"OggS" and len(content) >= at + 27:
        segments = content[at + 27 : at + 27 + content[at + 26]]
        end = at + 27 + len(segments) + sum(segments)
        content[at + 22 : at + 26] = bytes(4)
        content[at + 22 : at + 26] = struct.pack("<I", _ogg_crc(bytes(content[at:end])))
        at = end
    return bytes(content)


@cache
def _ogg_crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = value << 1 & 0xFFFFFFFF ^ (0x04C11DB7 if value >> 31 else 0)
        table.append(value)
    return table


def _ogg_crc(page: bytes) -> int:
    table, crc = _ogg_crc_table(), 0
    for byte in page:
        crc = (crc << 8 & 0xFFFFFFFF) ^ table[crc >> 24 ^ byte]
    return crc


@dataclass(frozen=True)
class Chunk:
    """A chunk of a RIFF file: bytes, or so many bytes of noise; ``claim`` is a size that it does not have."""

    name: bytes
    content: bytes | int
    claim: int | None = None

    def data(self) -> bytes:
        """Its bytes."""
        return _noise(self.content) if isinstance(self.content, int) else self.content


@cache
def _noise(length: int) -> bytes:
    return np.random.default_rng(0).bytes(length)


@dataclass(frozen=True)
class Riff:
    """A file of chunks in one of the four forms of WAV."""

    form: str
    chunks: tuple[Chunk, ...]
    claim: int | None = None
    edits: tuple[Edit, ...] = ()

    def data(self) -> bytes:
        """The bytes of the file."""
        order = ">" if self.form == "RIFX" else "<"
        wide = self.form == "W64"
        body = (b"wave" + _W64) if wide else b"WAVE"
        for chunk in self.chunks:
            content = chunk.data()
            size = len(content) if chunk.claim is None else chunk.claim
            if wide:
                head = chunk.name + _W64 + struct.pack("<Q", (size + 24) % 2**64)
                body += head + content + bytes(-len(content) % 8)
            else:
                head = chunk.name + struct.pack(f"{order}I", size % 2**32)
                body += head + content + bytes(len(content) % 2)
        size = len(body) if self.claim is None else self.claim
        if wide:
            whole = b"riff" + _W64_RIFF + struct.pack("<Q", (size + 24) % 2**64) + body
        else:
            whole = self.form.encode() + struct.pack(f"{order}I", size % 2**32) + body
        return edited(whole, self.edits)


_W64_RIFF = bytes.fromhex("2e91cf11a5d628db04c10000")
_W64 = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")
_some_edits = edits(once_in=4)


_claims = sometimes(12, interesting, None)
_formats = st.sampled_from(
    [
        *[(1, 16)] * 4,
        (1, 8),
        (1, 24),
        (1, 32),
        (3, 32),
        (3, 64),
        (6, 8),
        (7, 8),
        (2, 4),
        (17, 4),
        (49, 0),
        (85, 0),
        (1, 12),
    ]
)
_channels = st.sampled_from([1, 1, 1, 2, 2, 2, 6, 32, 256, 1024])
_rates = st.sampled_from(
    [8000, 16_000, 16_000, 44_100, 48_000, 192_000, 44_101, 999_983, 1_000_000, 1, 2, 7, 2**31 - 1]
)
_wrong_fields = st.sampled_from([*[()] * 10, (0,), (1,), (2,), (3,), (4,), (5,), (1, 4), (1, 4, 5)])
_extras = st.sampled_from([b"", b"", b"\0\0", b"\x02\0\xf9\x03", b"\xff\xff"])
_codings = st.sampled_from([1, 1, 3, 6, 2, 0])
_names = st.sampled_from(
    [
        b"LIST",
        b"fact",
        b"PEAK",
        b"cue ",
        b"smpl",
        b"bext",
        b"id3 ",
        b"JUNK",
        b"fmt ",
        b"data",
        b"cart",
        b"acid",
        b"inst",
    ]
)
_contents = st.one_of(st.binary(max_size=40), st.sampled_from([b"INFOINAM" + b"\xff" * 8, bytes(700)]))
_chunks = st.builds(Chunk, _names, _contents, _claims)
_samples = st.sampled_from(
    [*[20_000] * 10, 4001, 64, 2, 1, 0, b"\0\0\xc0\x7f" * 8, b"\0\0\x80\x7f" * 8]
)  # NaN, infinity
_forms = st.sampled_from(["RIFF", "RIFF", "RIFF", "RF64", "W64", "RIFX"])


@st.composite
def fmt_chunks(draw: st.DrawFn, order: Literal["little", "big"]) -> bytes:
    """The description of samples; in some, fields are not what they should be."""
    (tag, bits), channels, rate = draw(_formats), draw(_channels), draw(_rates)
    extensible = tag in (1, 3) and draw(seldom)
    align = channels * -(-bits // 8)
    values = [0xFFFE if extensible else tag, channels, rate, rate * align, align, bits]
    for number in draw(_wrong_fields):
        values[number] = draw(interesting)
    sizes = (16, 16, 32, 32, 16, 16)
    fields = b"".join((value % 2**size).to_bytes(size // 8, order) for value, size in zip(values, sizes, strict=True))
    if not extensible:
        return fields + draw(_extras)
    return fields + struct.pack("<HHIH", 22, bits, 3, draw(_codings)) + _SUBFORMAT


@st.composite
def riffs(draw: st.DrawFn) -> Riff:
    """WAV, RIFX, RF64 or WAVE64 with a few chunks, mostly in order."""
    form = draw(_forms)
    description = Chunk(b"fmt ", draw(fmt_chunks("big" if form == "RIFX" else "little")), draw(_claims))
    samples = Chunk(b"data", draw(_samples), draw(_claims))
    chunks = [description, samples]
    if form == "RF64":
        sizes = [draw(sometimes(6, interesting, len(samples.data()))) % 2**64 for _ in range(3)]
        chunks.insert(0, Chunk(b"ds64", struct.pack("<QQQI", *sizes, (draw(_claims) or 0) % 2**32)))
    for extra in draw(st.lists(_chunks, max_size=2)):
        chunks.insert(draw(st.integers(0, len(chunks))), extra)
    if draw(seldom):
        chunks = draw(st.permutations(chunks))
    return Riff(form, tuple(chunks), draw(_claims), draw(_some_edits))


def recordings(names: list[str]) -> st.SearchStrategy[Recorded]:
    """Recorded files of these kinds; most have a field or two overwritten."""
    fields = st.lists(st.tuples(st.integers(0, 19), interesting), max_size=2).map(tuple)
    return st.builds(Recorded, st.sampled_from(names), fields, _some_edits)


Sound = Recorded | Riff

"""Files of ``torch.save``: what becomes of their objects, pickles, archives and bytes."""

import hashlib
import io
import struct
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .edits import Edit, edited, edits, few
from .pickles import PICKLE, Change, Planted, changed, changes, expressions, gentle_changes, instructions, plain
from .weights import ODD, content

WEIGHTS_LAYOUTS = ("zip", "zip", "legacy", "checksum")
STATE_LAYOUTS = ("checksum", "checksum", "checksum", "zip", "legacy")


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in the dictionaries of an object."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield content, key
            yield from places(value)
    elif isinstance(content, list):
        for value in content:
            yield from places(value)


@dataclass(frozen=True)
class Pickled:
    """A ``torch.save`` file.

    Attributes:
        base: What it holds.
        layout: An archive, ``"zip"``, or with our checksum, made after edits (``"checksum"``) or before them
            (``"sealed"``); or ``"legacy"``, the layout of PyTorch before 1.6.
        odd: A tensor, by its number, that is given another form.
        planted: Places, by key or number, whose values are expressions instead; of a negative number the key is.
        changes: Of the instructions of its pickle.
        entries: Changes of the entries of its archive.
        edits: Of its bytes.
    """

    base: str
    layout: str = "zip"
    odd: tuple[tuple[int, str], ...] = ()
    planted: tuple[tuple[int | str, bytes], ...] = ()
    changes: tuple[Change, ...] = ()
    entries: tuple[Change, ...] = ()
    edits: tuple[Edit, ...] = ()

    def data(self) -> bytes:
        """The bytes of the file."""
        object_ = content(self.base)
        tensors = [(parent, key) for parent, key in places(object_) if isinstance(parent[key], Tensor)]
        for number, form in self.odd:
            parent, key = tensors[number % len(tensors)]
            parent[key] = ODD[form](parent[key])
        for number, expression in self.planted:
            _plant(object_, number, expression)
        file = io.BytesIO()
        torch.save(object_, file, pickle_module=PICKLE, _use_new_zipfile_serialization=self.layout != "legacy")
        data = file.getvalue()
        if self.layout == "sealed":
            return edited(_with_checksum(data), self.edits)
        if self.layout == "legacy":
            data = _with_changed_pickle(data, self.changes)
        elif self.changes or self.entries:
            data = _with_changed_entries(data, self.changes, self.entries)
        data = edited(data, self.edits)
        return _with_checksum(data) if self.layout == "checksum" else data

    def write(self, folder: Path) -> None:
        """Write the file."""
        (folder / "checkpoint").write_bytes(self.data())


def _plant(content: dict[str, Any], place: int | str, expression: bytes) -> None:
    known = list(places(content))
    container, key = known[place % len(known)] if isinstance(place, int) else _place_of(place, known)
    if isinstance(place, int) and place < 0:
        container[Planted(expression)] = container.pop(key)
    else:
        container[key] = Planted(expression)


def _place_of(name: str, known: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    return next((container, key) for container, key in known if key == name)


def _with_changed_pickle(data: bytes, changes: tuple[Change, ...]) -> bytes:
    """Change the fourth pickle of a file of PyTorch before 1.6, after magic number, version and system."""
    start = 0
    for _ in range(3):
        start += sum(map(len, instructions(data[start:])))
    return data[:start] + changed(data[start:], changes)


def _with_changed_entries(data: bytes, changes: tuple[Change, ...], entries: tuple[Change, ...]) -> bytes:
    """Change the pickle of an archive, and its entries."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = [[name, archive.read(name), zipfile.ZIP_STORED] for name in archive.namelist()]
    for file in files:
        if file[0].endswith("/data.pkl"):
            file[1] = changed(file[1], changes)
    for name, number, *more in entries:
        at = number % len(files)
        match name, more:
            case "drop", [] if len(files) > 1:
                del files[at]
            case "move", [other]:
                files.insert(other % len(files), files.pop(at))
            case "name", [new]:
                files[at][0] = new
            case "fill", [new]:
                files[at][1] = new
            case "add", [new, content]:
                files.insert(at, [new, content, zipfile.ZIP_STORED])
            case "deflate", []:
                files[at][2] = zipfile.ZIP_DEFLATED
            case "bomb", []:
                files[at][1:] = bytes(1 << 25), zipfile.ZIP_DEFLATED
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w") as archive:  # of names that come twice
        for name, content, how in files:
            archive.writestr(zipfile.ZipInfo(name), content, how)
    return file.getvalue()


def _with_checksum(data: bytes) -> bytes:
    """Put the checksum of an archive into its comment; a comment of its own stays beside it."""
    start = data[:-2]
    digest = hashlib.sha256(start + bytes(2)).hexdigest().encode()
    return start + struct.pack("<H", 7 + len(digest)) + b"sha256:" + digest


NAMES = (
    *(f"archive/{name}" for name in ("data.pkl", "constants.pkl", "version", "byteorder", ".format_version", "data/0")),
    *("archive/.storage_alignment", "archive/.data/serialization_id", "archive/code/x.py", "data.pkl", "../data.pkl"),
    *("/etc/passwd", "archive/", "", "other/data.pkl", "archive/data/../data.pkl", "x" * 60_000),
)
CONTENTS = (
    *(b"", b"little", b"big", b"3", b"1", b"0", b"-1", b"9" * 30, b"9" * 5000, b"\xff\xfe", b"x" * 70_000),
    *(b"\x80\x02}q\0.", b"\x80\x02" + b"]" * 50_000, b"\x80\x04\x95" + b"\xff" * 8),
)
_number = st.integers(0, 2**16)
_entry_changes = st.one_of(
    st.tuples(st.just("drop"), _number),
    st.tuples(st.just("move"), _number, _number),
    st.tuples(st.just("name"), _number, st.sampled_from(NAMES)),
    st.tuples(st.just("fill"), _number, st.sampled_from(CONTENTS)),
    st.tuples(st.just("add"), _number, st.sampled_from(NAMES), st.sampled_from(CONTENTS)),
    st.tuples(st.just("deflate"), _number),
    st.tuples(st.just("bomb"), _number),
)


def pickled(bases: Sequence[str], layouts: Sequence[str]) -> st.SearchStrategy[Pickled]:
    """Files of some kinds; one thing or two is wrong with each."""
    base, layout = st.sampled_from(bases), st.sampled_from(layouts)
    planted = few(st.tuples(st.integers(-(2**16), 2**16), expressions))
    odd = st.tuples(st.tuples(_number, st.sampled_from(sorted(ODD))))
    return st.one_of(
        st.builds(Pickled, base, layout, odd),
        st.builds(Pickled, base, layout, planted=few(st.tuples(_number, plain))),
        st.builds(Pickled, base, layout, changes=few(gentle_changes)),
        st.builds(Pickled, base, layout, planted=planted),
        st.builds(Pickled, base, layout, changes=few(changes)),
        st.builds(Pickled, base, st.sampled_from(["zip", "checksum"]), entries=few(_entry_changes)),
        st.builds(Pickled, base, st.one_of(layout, st.just("sealed")), edits=edits(once_in=1)),
        st.builds(Pickled, base, layout, odd, planted, few(changes, 1), edits=edits(once_in=3)),
    )

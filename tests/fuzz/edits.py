"""Edits of bytes: what breaks files on the way, and what somebody may write into them on purpose."""

import struct
from collections.abc import Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")

Edit = tuple[Any, ...]
"""(name, position, ...); positions count from the beginning, or from the end if negative, and wrap round."""

INTERESTING = (
    *(0, 1, 2, 3, 16, 255, 256, 1024, 65535, 65536, 1_000_000, 10**9, 10**12),
    *(2**n + d for n in (7, 15, 31, 32, 36, 60, 63, 64) for d in (-1, 0, 1)),
    *(-1, -2, -(2**31), -(2**63)),
)
"""Integers at which formats and code change their mind."""

interesting = st.sampled_from(INTERESTING)

_INTEGERS = tuple(
    dict.fromkeys(
        (value % 2**bits).to_bytes(bits // 8, order)
        for value in INTERESTING
        for bits in (8, 16, 32, 64)
        for order in ("little", "big")
    )
)
_FLOATS = tuple(
    struct.pack(f"{order}{kind}", value)
    for value in (float("nan"), float("inf"), float("-inf"), -0.0, 1e38, 1e-40)
    for order in "<>"
    for kind in "fd"
)

seldom = st.sampled_from([False] * 15 + [True])


def sometimes(once_in: int, strategy: st.SearchStrategy[T], otherwise: T) -> st.SearchStrategy[T]:
    """Draw from a strategy once in so many times; ``st.one_of`` has no weights."""
    return st.integers(1, once_in).flatmap(lambda number: strategy if number == once_in else st.just(otherwise))


_positions = st.one_of(
    st.integers(0, 63), st.integers(0, 1023), st.integers(-1024, -1), st.integers(-64, -1), st.integers(0, 2**20)
)
_values = st.one_of(st.sampled_from(_INTEGERS), st.sampled_from(_FLOATS), st.binary(min_size=1, max_size=9))
_lengths = st.one_of(st.integers(1, 8), st.integers(1, 4096))

_EDITS = st.one_of(
    st.tuples(st.just("put"), _positions, _values),
    st.tuples(st.just("flip"), _positions, st.integers(0, 7)),
    st.tuples(st.just("insert"), _positions, _values),
    st.tuples(st.just("remove"), _positions, _lengths),
    st.tuples(st.just("copy"), _positions, _lengths, _positions),
    st.tuples(st.just("cut"), _positions),
)


def few(strategy: st.SearchStrategy[T], most: int = 2) -> st.SearchStrategy[tuple[T, ...]]:
    """Make tuples of one up to ``most``."""
    return st.lists(strategy, min_size=1, max_size=most).map(tuple)


def edits(once_in: int) -> st.SearchStrategy[tuple[Edit, ...]]:
    """Make edits; of most files none."""
    return sometimes(once_in, few(_EDITS, 4), ())


def edited(data: bytes, edits: Sequence[Edit]) -> bytes:
    """Apply edits, one after the other."""
    for name, position, *rest in edits:
        at = position % (len(data) + 1)
        match name, rest:
            case "put", [value]:
                data = data[:at] + value + data[at + len(value) :]
            case "flip", [bit]:
                data = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if at < len(data) else data
            case "insert", [value]:
                data = data[:at] + value + data[at:]
            case "remove", [length]:
                data = data[:at] + data[at + length :]
            case "copy", [length, target]:
                to = target % (len(data) + 1)
                data = data[:to] + data[at : at + length] + data[to:]
            case "cut", []:
                data = data[:at]
    return data

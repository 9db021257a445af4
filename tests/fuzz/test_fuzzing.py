"""The instrument itself: an input that must count as a failure does."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .fuzzing import Fuzz, Tally, shares
from .worker import Target, Worker


def write(folder: Path, case: Any) -> None:
    (folder / "input").write_text(str(case))


def read(folder: Path) -> None:
    case = (folder / "input").read_text()
    if case == "refused":
        raise ValueError("no good")
    if case == "escaped":
        raise KeyError("surprise")
    if case == "unclear":
        raise ValueError("no\ngood")
    if case == "memory":
        bytes(1 << 40)
    if case == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == "hang":
        time.sleep(60)
    if case == "process":
        subprocess.run(["true"], check=True)
    if case == "file":
        (folder / "marker").touch()


def read_less(folder: Path) -> None:
    if (folder / "input").read_text() == "half refused":
        raise ValueError("no good")


TARGET = Target(write, (read, read_less), (ValueError,))


@pytest.fixture(scope="module")
def impatient() -> Iterator[Worker]:
    worker = Worker(seconds=2, mib=256)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("fine", "result", ""),
        ("half refused", "result", ""),
        ("refused", "result", ""),
        ("escaped", "escaped", "KeyError: 'surprise'"),
        ("unclear", "unclear", "no\ngood"),
        ("memory", "escaped", "MemoryError"),
        ("crash", "crashed", "ended with -11"),
        ("hang", "too slow", "more than 2 s"),
        ("process", "ran code", "subprocess.Popen"),
        ("file", "ran code", "marker"),
    ],
)
def test_outcomes(impatient: Worker, case: str, kind: str, text: str):
    outcome = impatient.run(TARGET, case)
    assert outcome.kind == kind, outcome
    assert text in outcome.text
    assert outcome.failed == (kind != "result")
    assert impatient.run(TARGET, "fine").kind == "result"


def test_a_refusal_of_every_reader(impatient: Worker):
    outcome = impatient.run(Target(write, (read,), (ValueError,)), "refused")
    assert (outcome.kind, outcome.text, outcome.failed) == ("ValueError", "no good", False)


def test_a_failure_is_shrunk_and_counted(impatient: Worker):
    fuzz = Fuzz(impatient, inputs=50, seed=0, tally=Tally())
    fuzz(TARGET, st.text("abc", max_size=9), examples=["fine"])
    assert fuzz.tally.outcomes == {"result": 51}
    with pytest.raises(AssertionError, match="KeyError: 'surprise'"):
        fuzz(TARGET, st.sampled_from(["fine", "escaped"]))
    assert fuzz.tally.outcomes["escaped"] >= 1
    with pytest.raises(AssertionError, match="KeyError: 'surprise'"):
        fuzz(TARGET, st.just("fine"), examples=["escaped"])
    assert fuzz.tally.figures()["outcomes"]["escaped"] >= 2


@given(st.integers(0, 10**5), st.lists(st.integers(1, 9), min_size=1))
def test_shares(inputs: int, weights: list[int]):
    parts = shares(inputs, weights)
    assert sum(parts) == inputs
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - inputs * weight / sum(weights)) <= 1

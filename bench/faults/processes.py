"""Commands in processes of their own, which can be watched, signalled and killed."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]

PATIENCE = 300.0
"""Seconds for whatever takes some seconds on a machine that does nothing else."""


class UnexpectedError(RuntimeError):
    """A command that did not do what its scenario waits for."""


class Command:
    """A command in a session of its own, so that no signal to it reaches anyone else.

    Args:
        arguments: The program and what it is given.
        printed: File for what it prints.
        environment: Variables that it gets besides those of this process.

    Attributes:
        process: The program.
    """

    def __init__(self, arguments: Sequence[str], printed: Path, environment: dict[str, str]):
        self._printed, self._arguments = printed, arguments
        with printed.open("wb") as file:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd=ROOT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self._printed.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        """The last line that it has printed."""
        return (self.text.splitlines() or [""])[-1]

    def wait_for(self, find: Callable[[], T | None], what: str, *, every: float = 0.005) -> T:
        """Wait until something is found.

        Args:
            find: Looks for it, and returns None or False until it is there.
            what: What it is, for messages.
            every: Seconds between looks.

        Raises:
            UnexpectedError: It did not come, or the command ended before.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            ended = self.process.poll() is not None
            if found := find():
                return found
            if ended:
                raise UnexpectedError(f"status {self.process.returncode} before {what}: {self._tail()}")
            if time.monotonic() > deadline:
                raise UnexpectedError(f"no {what} in {PATIENCE:.0f} s: {self._tail()}")
            time.sleep(every)

    def wait_for_text(self, text: str) -> None:
        """Wait until it has printed something.

        Raises:
            UnexpectedError: It does not.
        """
        self.wait_for(lambda: text in self.text, repr(text), every=0.05)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait until it has ended, and return its status; below 0, the signal that killed it.

        Raises:
            UnexpectedError: It does not end.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise UnexpectedError(f"no end in {seconds:.0f} s: {self._tail()}") from None

    def signal(self, number: int) -> None:
        """Send a signal to the program alone."""
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Send a signal to the program and the processes of its group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill the program alone with SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Kill it and all that it has started, as far as that is still its child or in its group."""
        for process in [*descendants(self.process.pid), self.process.pid]:
            for send in (os.killpg, os.kill):  # torchrun gives each rank a group of its own
                with suppress(ProcessLookupError, PermissionError):
                    send(process, signal.SIGKILL)
        self.process.wait()

    def _tail(self) -> str:
        return " / ".join(self.text.splitlines()[-3:]) or "nothing printed"


def alive(process: int) -> bool:
    """Whether a process runs or is stopped."""
    state = _status(process)
    return state is not None and state[0] != "Z"


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    found = (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())
    return sorted(process for process in found if (_status(process) or ("", 0))[1] == parent)


def descendants(parent: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    return [process for child in children(parent) for process in (child, *descendants(child))]


def ranks_of(parent: int) -> dict[int, int]:
    """Processes by rank that a torchrun has started."""
    ranks = {}
    for process in children(parent):
        with suppress(OSError):
            variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            values = dict(variable.partition(b"=")[::2] for variable in variables)
            if b"RANK" in values:
                ranks[int(values[b"RANK"])] = process
    return ranks


def _status(process: int) -> tuple[str, int] | None:
    """State and parent of a process; None where there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(") ")[2].split()[:2]
    return state, int(parent)

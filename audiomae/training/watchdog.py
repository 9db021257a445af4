"""A rank that dies or hangs ends the run with a line that names it: all tell each other through a store what they do.

A process group names none. Where a rank died, gloo tells the others that some connection was closed, and NCCL waits;
where one hangs, all wait in the next collective.
"""

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import torch.distributed as dist

from audiomae.training.rollcall import NAMED, SILENT_BEATS, Beat, RollCall

T = TypeVar("T")

LOST_BEATS = 10
"""Beats that are missing of a rank that is dead, where nothing else speaks for that; at least."""
TOLD = "told"
"""Key of the number of ranks that were about to tell what ended the run."""


def lost_rank(error: BaseException) -> bool:
    """Whether this is what a collective raises after another rank died or was stopped.

    gloo raises a RuntimeError that begins with the place in its source, as in ``[/path/gloo/transport/tcp/pair.cc:547]
    Connection closed by peer``; NCCL and stores have classes of their own.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/transport/" in str(error))


class Watchdog:
    """Watches, within a ``with`` statement, that all ranks of a run go on; otherwise ends this process with status 1.

    Before that, the first rank that notices prints a line, and each one writes the stack traces of its threads. A rank
    is dead when its beats stop, and the run hangs when no rank has marked anything for ``timeout`` seconds. Marks that
    move are proof that all ranks live, since they train in lockstep: nothing ends a run before they stop.

    Args:
        store: From :func:`open_store`, for this object alone.
        rank: This process.
        world_size: How many there are.
        timeout: Seconds without a mark of any rank after which the run ends; 0 watches over nothing.
        report: Folder that gets ``hang-rank-N.txt``; None writes none.

    Attributes:
        interval: Seconds between beats.
        silence: Seconds without a beat after which a rank is dead.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, timeout: float, report: Path | None = None):
        # Every beat reads those of all ranks: the more there are, the rarer it must be.
        self.interval = min(max(timeout / 20, 0.5), max(world_size / 100, 1.0))
        self.silence = max(timeout / 10, LOST_BEATS * self.interval)
        self._store, self._rank, self._world_size, self._timeout = store, rank, world_size, timeout
        self._report = report
        self._roll = RollCall(rank, world_size, self.interval)
        self._mark = (0, "starting")
        self._left: str | None = None
        # Turns of the watch since this rank's last mark and since the store's last answer.
        self._still = self._unanswered = 0
        self._told = self._blaming = False
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self._timeout:
            # Two, for a store that is stopped, not gone, answers no request and lets none time out.
            self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._watch)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        text = str(error).strip()
        self.leave(f"{kind.__name__}: {text.splitlines()[-1] if text else 'no message'}" if kind else "")

    def mark(self, step: int, doing: str) -> None:
        """Tell that this rank goes on; costs next to nothing.

        Args:
            step: The step that it is in.
            doing: What it does, such as "waiting for data"; where it may wait for other ranks, a constant of
                :mod:`audiomae.training.rollcall`.
        """
        self._mark = (step, doing)

    def leave(self, reason: str = "") -> None:
        """Tell the others that this rank ends, and watch no more.

        Args:
            reason: What is wrong with it; empty if nothing is, or nothing but what is wrong with another.
        """
        if self._left is None:
            self._left = reason
        self._stop.set()
        for thread in self._threads:
            thread.join(2.0)

    def blame(self, patience: float) -> list[str]:
        """Find out which ranks are gone, for one whose collective failed and which ends after this.

        Args:
            patience: Seconds to wait until that is clear; at least some beats.

        Returns:
            Lines that name them, or tell that none is gone: on the first rank to know, which speaks for all. Nothing on
            the others.
        """
        self._left, self._blaming = "", True
        deadline = time.monotonic() + max(patience, 2 * SILENT_BEATS * self.interval)
        while self._threads and time.monotonic() < deadline:
            if self._roll.gone() or self._store_is_silent(0.0):
                time.sleep(self.interval)  # for others that went with them
                break
            time.sleep(self.interval / 4)
        if not self._may_tell():
            return []
        if not self._threads:
            return ["another rank is gone; --hang-timeout 0 watches over none, so which one is not known"]
        if self._store_is_silent(0.0):
            return [self._describe_store()]
        gone = self._roll.gone()
        lines = [self._roll.describe(rank) for rank in gone[:NAMED]]
        if len(gone) > NAMED:
            lines.append(f"{len(gone) - NAMED} more ranks are gone")
        return lines or ["a connection between ranks failed, though all of them show signs of life"]

    def _exchange(self) -> None:
        """Tell of this rank and read of the others, until this one leaves or the store is gone."""
        host, process, number = socket.gethostname(), os.getpid(), 0
        try:
            self._store.add(TOLD, 0)
            leaves = False
            while not leaves:
                leaves = self._stop.is_set()
                number += 1
                beat = Beat(number, host, process, *self._mark, self._still * self.interval, self._left)
                self._store.set(str(self._rank), json.dumps(beat))
                if not leaves:
                    self._read()
                    self._stop.wait(self.interval)
        except RuntimeError:  # a store whose connection is lost stays lost; the watch sees that nothing comes
            return

    def _read(self) -> None:
        """Read the last beats of the ranks that have begun."""
        # A store would wait for the keys of the others.
        ranks = [r for r in range(self._world_size) if r in self._roll.beats or self._store.check([str(r)])]
        told, *beats = self._store.multi_get([TOLD, *map(str, ranks)])
        self._roll.read({rank: Beat(*json.loads(beat)) for rank, beat in zip(ranks, beats, strict=True)})
        self._told = int(told) > 0
        self._unanswered = 0

    def _watch(self) -> None:
        """Judge the run at every turn, until this rank leaves."""
        last, warned = self._mark, False
        while not self._stop.wait(self.interval):
            # Turns, not a clock: while this process is stopped, there are none.
            self._still = self._still + 1 if self._mark is last else 0
            last = self._mark
            self._unanswered += 1
            if self._blaming:
                continue
            if self._told:
                self._end("another rank has told what ended the run", speaks=False)
            elif failure := self._judge():
                self._end(failure)
            elif self._store_is_silent(self.silence) and not warned and os.environ.get("LOCAL_RANK", "0") == "0":
                warned = True
                _say(f"{self._describe_store()}; the run goes on, but a rank that hangs would not be named")

    def _judge(self) -> str | None:
        """Tell what ends the run; None if it goes on."""
        still = self._still * self.interval
        if self._store_is_silent(self.silence):
            where = f"{self._roll.describe(self._rank)}, and {self._describe_store()}"
            return where if still >= self._timeout else None
        if still >= self.silence and (gone := self._roll.gone(self.silence)):
            return self._roll.name(gone)
        if min(still, self._roll.stillness()) < self._timeout:
            return None
        suspects = self._roll.suspects()
        return f"the run hangs{' at one of these' if len(suspects) > 1 else ''}: {self._roll.name(suspects)}"

    def _store_is_silent(self, silence: float) -> bool:
        """Whether the store did not answer for so many seconds; at least some beats."""
        return self._unanswered * self.interval >= max(silence, SILENT_BEATS * self.interval)

    def _describe_store(self) -> str:
        """Tell where a store that does not answer is, and whose fault that is."""
        store = self._store
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        place = f" at {store.host}:{store.port}" if isinstance(store, dist.TCPStore) else ""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"the store{place} does not answer: the torchrun that keeps it, or its machine, is gone or stopped"
        return f"the store{place} does not answer: rank 0, which keeps it, is gone or stopped"

    def _may_tell(self) -> bool:
        """Whether this rank is the first to tell what ends the run, or none can know."""

        def claim() -> bool | None:
            try:
                return self._store.add(TOLD, 1) == 1
            except RuntimeError:
                return None

        return _within(2.0, claim) is not False

    def _end(self, line: str, *, speaks: bool = True) -> None:
        """End this process: an orderly end would wait for the thread that hangs."""
        traces = _within(5.0, partial(self._write_traces, line))
        if speaks and self._may_tell():
            _say(
                f"error: {line}{f'; stack traces are in {traces}' if traces else ''}; --resume auto goes on after the "
                f"last save; --hang-timeout SECONDS changes the patience of {self._timeout:g} s"
            )
        if self._world_size > 1:
            time.sleep(3 * self.interval)  # until the others know: whoever started them ends them with this one
        os._exit(1)

    def _write_traces(self, line: str) -> str | None:
        """Write what is known and the stack traces of this process; return where those of all ranks are."""
        if self._report is None:
            return None
        ranks = map(self._roll.describe, range(self._world_size))
        try:
            self._report.mkdir(parents=True, exist_ok=True)
            with (self._report / f"hang-rank-{self._rank}.txt").open("w", encoding="utf-8") as file:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                file.write("\n".join([f"{now} rank {self._rank}: {line}", *ranks, "\n"]))
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError:
            return None
        return str(self._report / "hang-rank-*.txt")


def _within(seconds: float, function: Callable[[], T]) -> T | None:
    """Call what may block forever, as a dead file system does; None if it does not return in time."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _say(line: str) -> None:
    """Print a line on stderr past Python, whose lock on it a thread that hangs may hold."""
    start = "\n" if os.isatty(2) else ""  # below a progress bar
    _within(2.0, partial(os.write, 2, f"{start}audiomae: {line}\n".encode()))

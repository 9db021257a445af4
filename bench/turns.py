"""Several ways to do one thing, timed in turns, so that what else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch

Mark = Callable[[str], None]
Call = Callable[[int, Mark], object]
"""Does the thing once: ``call(round, mark)``. The round chooses the inputs; ``mark(name)`` ends a part of the work."""

_SPIN_CYCLES_PER_S = 2e9  # about the clock of a GPU; the spin need only be long enough
_LONGEST_SPIN_S = 0.05


def unmarked(name: str) -> None:
    """Take the mark of a call that nobody times."""


class Laps:
    """Times the parts of a call.

    A CPU is timed by its clock. A GPU is timed by events, in one of two ways: ``kernels`` is the device's time alone,
    with every launch queued behind a kernel that spins until the host is done, so that no gap counts; without it, the
    time is the host's from call to synchronisation, which is what a user waits, and events divide it among the parts.

    Args:
        device: Where the work is done.
        kernels: Time the device alone.
    """

    def __init__(self, device: torch.device, *, kernels: bool):
        self.cuda = device.type == "cuda"
        self.kernels = kernels
        self._enqueue_s: dict[Call, float] = {}  # what the last call took on the host

    def time(self, call: Call, turn: int) -> dict[str, float]:
        """Run a call: milliseconds of each part that it marks, and of ``"all"``."""
        if not self.cuda:
            stamps = [("", time.perf_counter())]
            call(turn, lambda name: stamps.append((name, time.perf_counter())))
            total = 1e3 * (time.perf_counter() - stamps[0][1])
            laps = [(name, 1e3 * (stamp - before)) for (_, before), (name, stamp) in pairwise(stamps)]
            return _sums(laps) | {"all": total}
        torch.cuda.synchronize()
        if self.kernels and call in self._enqueue_s:
            spin_s = min(2 * self._enqueue_s[call], _LONGEST_SPIN_S)
            torch.cuda._sleep(int(spin_s * _SPIN_CYCLES_PER_S))
        events = [("", torch.cuda.Event(enable_timing=True))]
        start = time.perf_counter()
        events[0][1].record()

        def mark(name: str) -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append((name, event))

        call(turn, mark)
        mark("all")
        self._enqueue_s[call] = time.perf_counter() - start
        torch.cuda.synchronize()
        host = 1e3 * (time.perf_counter() - start)
        laps = [(name, before.elapsed_time(event)) for (_, before), (name, event) in pairwise(events)]
        return _sums(laps) | {"all": events[0][1].elapsed_time(events[-1][1]) if self.kernels else host}


def _sums(laps: list[tuple[str, float]]) -> dict[str, float]:
    """A part may be worked on more than once."""
    sums: dict[str, float] = {}
    for name, ms in laps:
        sums[name] = sums.get(name, 0.0) + ms
    return sums


@dataclass
class Timing:
    """Times of one provider in one mode.

    Attributes:
        p20: Of the times, milliseconds, as are ``p50`` and ``p80``.
        ratio: Median over rounds of the baseline's time to this one's.
        ratio_p20: The ratios' 20th percentile, and ``ratio_p80`` their 80th.
        rounds: How many.
    """

    p20: float
    p50: float
    p80: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    rounds: int


def spread(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of at least one value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[-1]


@dataclass
class Turns:
    """Runs every provider once a round, the first of them last, and the others in an order that moves on.

    Args:
        calls: What to time, by provider, the one that the comparison is about first.
        laps: Times a call.
        samples: By provider, the parts' times of every round.
    """

    calls: Mapping[str, Call]
    laps: Laps
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def run_others(self) -> None:
        """Run all but the first."""
        others = list(self.calls)[1:]
        turn = len(self.samples.get(others[0], ())) if others else 0
        for index in range(len(others)):
            self._run(others[(turn + index) % len(others)])

    def run_first(self) -> None:
        """Run the first, which ends the round."""
        self._run(next(iter(self.calls)))

    def _run(self, provider: str) -> None:
        done = self.samples.setdefault(provider, [])
        done.append(self.laps.time(self.calls[provider], len(done)))

    def run(self, rounds: int) -> None:
        """Run rounds."""
        for _ in range(rounds):
            self.run_others()
            self.run_first()

    def warm_up(self) -> float:
        """Run two rounds that do not count; return the milliseconds that the second took."""
        self.run(2)
        round_ms = sum(runs[-1]["all"] for runs in self.samples.values())
        self.samples.clear()
        return round_ms

    def timing(self, provider: str, baseline: str, mode: str) -> Timing:
        """Summarise what was measured.

        Args:
            provider: Whose times.
            baseline: Whose times are divided by them, round by round.
            mode: A part that the calls mark, or ``"all"``.
        """
        mine, theirs = ([run[mode] for run in self.samples[name]] for name in (provider, baseline))
        ratios = [slow / fast for slow, fast in zip(theirs, mine, strict=True)]
        low, ratio, high = spread(ratios)
        return Timing(*spread(mine), ratio, low, high, len(mine))

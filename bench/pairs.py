"""Two ways to do one thing, timed in turns, so that what else the machine does falls on both."""

import statistics
import time
from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture


def time_pairs(
    benchmark: BenchmarkFixture,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    rounds: int,
    warmup_rounds: int = 1,
) -> dict[str, float]:
    """Time ``ours`` with pytest-benchmark, and ``baseline`` right before each of its rounds.

    Args:
        benchmark: The fixture.
        ours: What the row is about. Both must end with what they started, also on a GPU.
        baseline: What it is compared with.
        rounds: Pairs.
        warmup_rounds: Pairs that do not count.

    Returns:
        Median seconds of the baseline, and median, lowest and highest ratio of its time to ours over the pairs.
    """
    times: dict[str, list[float]] = {"ours": [], "baseline": []}

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        times[name].append(time.perf_counter() - start)

    benchmark.pedantic(
        timed,
        args=("ours", ours),
        setup=lambda: timed("baseline", baseline),
        rounds=rounds,
        warmup_rounds=warmup_rounds,
    )
    mine, theirs = (times[name][-rounds:] for name in ("ours", "baseline"))
    ratios = sorted(slow / fast for slow, fast in zip(theirs, mine, strict=True))
    return {
        "baseline s": round(statistics.median(theirs), 6),
        "ratio": round(statistics.median(ratios), 2),
        "ratio from": round(ratios[0], 2),
        "ratio to": round(ratios[-1], 2),
    }

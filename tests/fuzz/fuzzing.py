"""Fuzzing: hypothesis makes the inputs, a worker reads them, and a tally counts how each one ended."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis.strategies import SearchStrategy

from .worker import Outcome, Target, Worker


def shares(inputs: int, weights: Sequence[float]) -> list[int]:
    """Share inputs by weight; the parts have the sum of the whole."""
    ends = [round(inputs * end / sum(weights)) for end in accumulate(weights)]
    return [end - begin for begin, end in pairwise([0, *ends])]


@dataclass
class Tally:
    """How the inputs of one test ended.

    Attributes:
        outcomes: Inputs by the kind of their outcome.
        seconds: Processor time that they took.
        slowest: What the slowest one took.
        largest: Memory that the largest one took, MiB.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0
    largest: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count an input."""
        self.outcomes[outcome.kind] += 1
        self.seconds += outcome.seconds
        self.slowest = max(self.slowest, outcome.seconds)
        self.largest = max(self.largest, outcome.mib)

    def figures(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return {
            "inputs": self.outcomes.total(),
            "outcomes": dict(self.outcomes.most_common()),
            "seconds": round(self.seconds, 1),
            "slowest_s": round(self.slowest, 2),
            "largest_mib": round(self.largest),
        }


@dataclass
class Fuzz:
    """Tries the inputs of one test.

    Attributes:
        worker: Reads them.
        inputs: How many to make.
        seed: What they are drawn from.
        tally: Counts them.
    """

    worker: Worker
    inputs: int
    seed: int
    tally: Tally

    def __call__(self, target: Target, cases: SearchStrategy[Any], examples: Sequence[Any] = ()) -> None:
        """Try examples, and as many inputs as the test has; the first that fails is shrunk and raised.

        Args:
            target: What to do with each.
            cases: Makes them.
            examples: Those that once failed, which are always tried.

        Raises:
            AssertionError: An input ended neither in a result nor in a refusal.
        """

        def check(case: Any) -> None:
            outcome = self.worker.run(target, case)
            self.tally.add(outcome)
            assert not outcome.failed, f"{outcome.kind}: {outcome.text}"

        for case in examples:
            check = example(case)(check)
        run = settings(
            max_examples=max(self.inputs, 1),
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(seed(self.seed)(given(cases)(check)))
        run()

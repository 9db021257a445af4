"""What came of a fault: how often it was made, and what was lost."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

CURVE_TOLERANCE = 1e-5
"""Relative difference of two losses that rounding in another order explains."""
SAME_RUN = "weights and log equal to the last bit"
SAME_CURVE = "losses equal to 1e-5 of their size"
_NOT_COMPUTED = ("time", "clips_per_second", "waiting")


@dataclass
class Outcome:
    """What came of a fault.

    Attributes:
        times: How often it was made.
        kinds: Of those, by what was hit, as ``{"during a save": 10}``.
        lost: What was lost, a line each, or was not as it should be.
        kept: What was compared and found to be the same.
        difference: Largest relative difference between losses that need not be equal to the last bit.
        absent: Why it could not be made here; then there is nothing else.
    """

    times: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    difference: float | None = None
    absent: str | None = None

    def add(self, *kinds: str) -> None:
        """Count a fault."""
        self.times += 1
        for kind in kinds:
            self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def expect(self, true: bool, otherwise: str) -> None:
        """Note what was lost unless something is true."""
        if not true:
            self.lost.append(otherwise)

    def keep(self, what: str) -> None:
        """Note what was found to be the same, once."""
        if what not in self.kept:
            self.kept.append(what)

    def same_run(self, one: Path, other: Path) -> None:
        """Compare what two runs logged, learnt and skipped, bit for bit."""
        before = len(self.lost)
        self.expect(computed(one) == computed(other), f"the log of {one.name} is not that of {other.name}")
        mine, others = (load_file(run / "weights.safetensors") for run in (one, other))
        different = [name for name in others if name not in mine or not mine[name].equal(others[name])]
        self.expect(not different, f"{len(different)} of {len(others)} tensors of {one.name} differ")
        self.expect(skipped(one) == skipped(other), f"the skipped.csv of {one.name} is not that of {other.name}")
        if len(self.lost) == before:
            self.keep(SAME_RUN)

    def same_curve(self, one: Path, other: Path) -> None:
        """Compare the losses that two runs logged, up to rounding, and what they skipped."""
        before = len(self.lost)
        curves = [{record["step"]: record["loss"] for record in read_log(run)} for run in (one, other)]
        self.expect(curves[0].keys() == curves[1].keys(), f"{one.name} logged other steps than {other.name}")
        for step, loss in curves[1].items():
            difference = abs(curves[0].get(step, loss) - loss) / abs(loss)
            self.difference = max(difference, self.difference or 0.0)
        self.expect(skipped(one) == skipped(other), f"the skipped.csv of {one.name} is not that of {other.name}")
        self.expect(
            (self.difference or 0.0) <= CURVE_TOLERANCE, f"the losses of {one.name} differ by {self.difference:.1e}"
        )
        if len(self.lost) == before:
            self.keep(SAME_CURVE)


def read_log(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, without a line that is being written."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run: Path) -> int:
    """The last step that a run has logged, 0 before any."""
    log = read_log(run)
    return log[-1]["step"] if log else 0


def computed(run: Path) -> list[dict[str, Any]]:
    """What a run has logged and does not depend on the time that it took."""
    return [{name: value for name, value in record.items() if name not in _NOT_COMPUTED} for record in read_log(run)]


def skipped(run: Path) -> list[list[str]]:
    """Rows of a run's skipped.csv, with its header."""
    return read_table(run / "skipped.csv")


def read_table(path: Path) -> list[list[str]]:
    """Rows of a CSV file; none if it is missing."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))

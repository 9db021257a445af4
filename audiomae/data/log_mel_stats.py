"""Mean and deviation of log-mel spectrograms: merged exactly enough, and the file that keeps them."""

import json
import math
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

SCHEMA = "audiomae.data.stats"
VERSION = 1


class StatsError(ValueError):
    """A file of statistics that cannot be used; the message names it."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of numbers.

    Two of them merge as in Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979): no large sums cancel, however far the mean is from 0.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """Take the moments of an array of any shape, in float64."""
        if values.size == 0:
            return cls()
        wide = values.astype(np.float64)
        mean = wide.mean()
        return cls(values.size, float(mean), float(np.square(wide - mean).sum()))

    def merge(self, other: "Moments") -> "Moments":
        """Take the moments of both; the order of several merges shows in the last bits."""
        count = self.count + other.count
        if count == 0:
            return self
        difference, share = other.mean - self.mean, other.count / count
        squares = self.squares + other.squares + difference * difference * self.count * share
        return Moments(count, self.mean + difference * share, squares)

    @property
    def std(self) -> float:
        """Standard deviation of the numbers themselves (dividing by their count)."""
        return math.sqrt(self.squares / self.count)


@dataclass(frozen=True)
class Stats:
    """What normalises the log-mel spectrograms of a data set: (x - mean) / (2 std).

    Attributes:
        mean: Their mean.
        std: Their plain standard deviation.
        sample_rate: Sample rate of the waveforms behind them, Hz.
        num_mels: Their mel bins.
    """

    mean: float
    std: float
    sample_rate: int
    num_mels: int


def read_stats(path: str | Path) -> Stats:
    """Read what ``python -m audiomae.data.stats`` wrote with ``--out``.

    Raises:
        OSError: It cannot be read.
        StatsError: It holds something else; names the file and what is wrong.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also text that is not UTF-8
        raise StatsError(f"{path}: no JSON ({error}), expected what audiomae.data.stats --out writes") from error
    except RecursionError as error:
        raise StatsError(f"{path}: no statistics but deeply nested JSON") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise StatsError(f"{path}: no statistics, expected what audiomae.data.stats --out writes")
    if content.get("version") != VERSION:
        raise StatsError(f"{path}: version is {reprlib.repr(content.get('version'))}, this package reads {VERSION}")
    try:
        return Stats(
            mean=_number(content, "mean"),
            std=_number(content, "std", above=0.0),
            sample_rate=_integer(content, "sample_rate", 1),
            num_mels=_integer(content, "num_mels", 3),
        )
    except StatsError as error:
        raise StatsError(f"{path}: {error}") from None


def _number(content: dict[str, Any], name: str, above: float = -math.inf) -> float:
    value = _find(content, name)
    largest = sys.float_info.max
    if type(value) not in (int, float) or not max(above, -largest) <= value <= largest or value == above:
        more = f" above {above:g}" if math.isfinite(above) else ""
        raise StatsError(f"{name} is {reprlib.repr(value)}, expected a finite number{more}")
    return float(value)


def _integer(content: dict[str, Any], name: str, least: int) -> int:
    value = _find(content, name)
    if type(value) is not int or not least <= value < 2**31:
        raise StatsError(f"{name} is {reprlib.repr(value)}, expected a whole number of at least {least}")
    return value


def _find(content: dict[str, Any], name: str) -> Any:
    if name not in content:
        raise StatsError(f"lacks {name}")
    return content[name]

"""From several ways to do one thing to rows of results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.rows import Row
from bench.turns import Call, Laps, Turns

COMPILER_MODES = {" + compile": None, " + max-autotune": "max-autotune-no-cudagraphs"}
"""What ends the name of a provider that runs under torch.compile, and in which mode it is compiled."""


def is_compiled(provider: str) -> bool:
    """Whether a provider runs under torch.compile."""
    return provider.endswith(tuple(COMPILER_MODES))


@dataclass
class Plan:
    """How much is measured.

    Attributes:
        full: Also how cost grows, and everything else that takes long.
        short: A few rounds: to see that every provider is right, and about how fast.
        pedantic: pytest-benchmark's ``benchmark.pedantic``, which then runs the rounds and reports the first provider.
    """

    full: bool = False
    short: bool = False
    pedantic: Callable[..., object] | None = None

    def compiler_modes(self, device: torch.device) -> dict[str, str | None]:
        """What :data:`COMPILER_MODES` are measured: autotuning takes minutes, and is for GPUs."""
        autotunes = self.full and device.type == "cuda"
        return {name: mode for name, mode in COMPILER_MODES.items() if autotunes or mode is None}

    def run(self, turns: Turns, budget_s: float) -> None:
        """Warm up, then run rounds for about ``budget_s`` seconds."""
        round_ms = turns.warm_up()
        rounds = 3 if self.short else int(min(max(1e3 * budget_s / round_ms, 5), 41))
        if self.pedantic is None:
            turns.run(rounds)
        else:
            self.pedantic(turns.run_first, setup=turns.run_others, rounds=rounds, iterations=1)


def compare(
    plan: Plan,
    about: Row,
    calls: Mapping[str, Call],
    laps: Laps,
    *,
    fields: Mapping[str, Mapping[str, Any]] | None = None,
    modes: Sequence[str] = ("all",),
    budget_s: float = 6,
) -> list[Row]:
    """Time providers in turns.

    Args:
        plan: How much is measured.
        about: What the rows have in common; its ``provider`` is the one that pytest-benchmark reports if it is among
            ``calls``, else its ``baseline``, which is.
        calls: By provider, what to time.
        laps: Times them.
        fields: By provider, what else is known of it, by the names of a row's fields.
        modes: Parts that every call marks, or ``"all"``.
        budget_s: About how long to go on, in seconds.

    Returns:
        A row for each mode of each provider.
    """
    first = about.provider if about.provider in calls else about.baseline
    turns = Turns({first: calls[first]} | dict(calls), laps)
    plan.run(turns, budget_s)
    rows = []
    for provider in calls:
        for mode in modes:
            timing = turns.timing(provider, about.baseline, mode)
            rows.append(
                replace(
                    about,
                    provider=provider,
                    mode="both" if mode == "all" and len(modes) > 1 else mode,
                    p20_ms=timing.p20,
                    p50_ms=timing.p50,
                    p80_ms=timing.p80,
                    ratio=timing.ratio,
                    ratio_p20=timing.ratio_p20,
                    ratio_p80=timing.ratio_p80,
                    rounds=timing.rounds,
                    facts=dict(about.facts),
                    **(fields or {}).get(provider, {}),
                )
            )
    return rows


def wrong(rows: Sequence[Row]) -> list[str]:
    """What is wrong with this package's own providers, which a benchmark fails for; others are shown."""
    return [
        f"{row.task}, {row.provider}: {row.wrong}" for row in rows if row.wrong and row.provider.startswith("fused")
    ]

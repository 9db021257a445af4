"""The page that shows what faults cost a run, made of the files that ``bench.reliability`` and the fuzz tests wrote."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.faults.outcome import SAME_CURVE
from bench.tables import markdown

FUZZ_FAILURES = ("escaped", "unclear", "ran code", "crashed", "too slow")
"""Ends of a fuzz test's input that are neither a result nor a refusal."""

INTRODUCTION = """\
What faults cost a pre-training run. Each row is made by a command in this repository, which starts the real training
command in processes of its own, makes the fault, goes on, and compares the run that came of it with one of the same
settings that nothing befell. Runs of one process must have learnt, logged and skipped the same to the last bit; where
the number of ranks changes the order of sums, the losses of all steps must be the same to 1e-5 of their size. Steps
after the last save are taken again, and must come out the same. A model with few parameters trains on the demo clips,
on a CPU: what is tested does not depend on its size.

A row that lost anything, or did not say what it should have said, is shown as failed.
"""


def load(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read files.

    Returns:
        Results of ``bench.reliability``, and figures of the fuzz tests.

    Raises:
        ValueError: A file that is neither, or a fault that stands in two files.
    """
    results: list[dict[str, Any]] = []
    fuzzed: list[dict[str, Any]] = []
    names: list[str] = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
            if "faults" in content:
                names += [row["name"] for row in content["faults"]]
                results.append(content)
            else:
                fuzzed.append({**content, "tests": dict(content["tests"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no results of bench.reliability or of the fuzz tests: {error!r}") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: in two of the files, expected each fault once")
    return results, fuzzed


def make_page(results: Sequence[dict[str, Any]], fuzzed: Sequence[dict[str, Any]], command: str) -> str:
    """Make the page.

    Args:
        results: Of ``bench.reliability``.
        fuzzed: Figures of the fuzz tests.
        command: What writes the page.
    """
    lines = [describe_fault(row) for content in results for row in content["faults"]]
    lines += [describe_fuzzing(figures) for figures in fuzzed]
    failed = sum(line[3].startswith("**failed**") for line in lines)
    parts = [
        "# Reliability",
        INTRODUCTION.strip(),
        f"{failed} of {len(lines)} rows failed." if failed else f"Nothing was lost in any of {len(lines)} rows.",
        markdown(["fault", "how injected", "how many times", "what was lost", "command"], lines, text_columns=5),
        "## Made with",
        markdown(["command", "took", "on"], [describe_run(content) for content in results], text_columns=3),
        f"This page is written by `{command}`.",
    ]
    return "\n\n".join(parts) + "\n"


def describe_fault(row: dict[str, Any]) -> list[str]:
    """Cells of a fault."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(row["kinds"].items()))
    times = f"{row['times']:,}" + (f": {kinds}" if kinds else "")
    return [row["fault"], row["how"], "" if row["absent"] else times, describe_lost(row), f"`{row['command']}`"]


def describe_lost(row: dict[str, Any]) -> str:
    """What a fault cost."""
    if row["lost"]:
        more = f" and {len(row['lost']) - 3} more" if len(row["lost"]) > 3 else ""
        lost = "; ".join(textwrap.shorten(line, 300, placeholder=" ...") for line in row["lost"][:3])
        return f"**failed**: {lost}{more}"
    if row["absent"]:
        return f"not run here: {row['absent']}"
    apart = "" if row["difference"] is None else f" (at most {row['difference']:.1e} apart)"
    return f"nothing: {', '.join(line + apart * (line == SAME_CURVE) for line in row['kept'])}"


def describe_fuzzing(figures: dict[str, Any]) -> list[str]:
    """Cells of the fuzz tests."""
    outcomes: dict[str, int] = {}
    for test in figures["tests"].values():
        for kind, count in test["outcomes"].items():
            outcomes[kind] = outcomes.get(kind, 0) + count
    failures = {kind: count for kind, count in outcomes.items() if kind in FUZZ_FAILURES}
    results = outcomes.pop("result", 0)
    if failures:
        lost = "**failed**: " + ", ".join(f"{count:,} {kind}" for kind, count in failures.items())
    else:
        refusals = ", ".join(f"{count:,} {kind}" for kind, count in outcomes.items())
        slowest = max(test["slowest_s"] for test in figures["tests"].values())
        largest = max(test["largest_mib"] for test in figures["tests"].values())
        lost = (
            f"nothing: {results:,} results, and refusals of one line: {refusals}; "
            f"the slowest took {slowest:g} s, the largest {largest} MiB"
        )
    tests = ", ".join(f"{test['inputs']:,} {name.replace('_', ' ')}" for name, test in figures["tests"].items())
    how = f"drawn by hypothesis {figures['hypothesis']} from seed {figures['seed']}, each read under limits"
    return ["hostile input files", how, f"{figures['inputs']:,}: {tests}", lost, f"`{figures['command']}`"]


def describe_run(content: dict[str, Any]) -> list[str]:
    """Cells of a run of ``bench.reliability``."""
    about = content["about"]
    where = f"{about['device']}, {about['cores']} cores, Python {about['python']}, torch {about['torch']}"
    took = f"{content['seconds'] / 60:.0f} min"
    return [f"`{content['command']}`", took, f"{where}; commit `{about['commit']}`, {about['date']}"]

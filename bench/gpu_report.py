"""What ``bench.gpu`` found, as JSON and as a page to read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as a Markdown table; what a row lacks is a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(columns), ["---"] * len(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Report:
    """Collects results and writes them under a folder.

    Args:
        folder: Gets ``results.json`` and ``results.md``.
        about: Device, versions, commit and date.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder = folder
        self.about = about
        self.ceilings: Row = {}
        self.tests: Row = {}
        self.red: list[str] = []
        self.operators: list[Row] = []
        self.steps: list[Row] = []
        self.profile = ""
        self.skipped: dict[str, str] = {}
        self.failures: dict[str, str] = {}

    def skip(self, stage: str, why: str) -> None:
        """Note a stage that did not run."""
        self.skipped[stage] = why

    def fail(self, stage: str, error: str) -> None:
        """Note a stage that raised."""
        self.failures[stage] = error

    def red_tests(self, operator: str) -> list[str]:
        """Red tests that name an operator, in their own name or in their file's."""
        return [test for test in self.red if operator in test]

    def write(self) -> None:
        """Write both files."""
        record = {name: value for name, value in vars(self).items() if name != "folder"}
        (self.folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        (self.folder / "results.md").write_text(self.text())

    def text(self) -> str:
        """The page."""
        parts = [f"# {self.about['device']}", ", ".join(f"{name} {value}" for name, value in self.about.items())]
        parts.append("Ceilings, measured here: " + ", ".join(f"{k} {v:.4g}" for k, v in self.ceilings.items()) + ".")
        if self.tests:
            parts.append("Tests: " + ", ".join(f"{count} {what}" for what, count in self.tests.items()) + ".")
        parts += [f"RED: {test}" for test in self.red]
        parts += [
            "## Operators",
            "ViT-B, 16 local decoder blocks. Times are medians in milliseconds. `floor` is the time that the measured "
            "ceilings allow for the operator's least traffic and FLOPs, whichever takes longer, over the fused time.",
            markdown_table(
                self.operators,
                (
                    "operator", "dtype", "batch", "mode", "eager", "compiled", "fused", "fused p20", "fused p80",
                    "over eager", "over compiled", "floor", "eager MiB", "fused MiB", "error",
                ),
            ),
            "## Training step of ViT-B",
            markdown_table(
                self.steps,
                ("impl", "compiled", "batch", "ms", "p20", "p80", "clips/s", "peak GiB", "above state GiB"),
            ),
        ]  # fmt: skip
        if self.profile:
            parts += ["## Profile of the fused step", f"```\n{self.profile}\n```"]
        parts += [f"Left out: {stage}: {why}." for stage, why in self.skipped.items()]
        parts += [f"FAILED: {stage}\n\n```\n{error}\n```" for stage, error in self.failures.items()]
        return "\n\n".join(parts) + "\n"

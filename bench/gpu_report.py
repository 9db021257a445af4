"""What ``bench.gpu`` found: rows for ``bench.report``, and a page to read at once."""

from pathlib import Path
from typing import Any

from bench.rows import Row, write_rows
from bench.tables import markdown_tables


class Report:
    """Collects results and writes them under a folder.

    Args:
        folder: Gets ``rows.json`` and ``results.md``.
        about: Device, versions, commit and date.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder = folder
        self.about = about
        self.tests: dict[str, int] = {}
        self.red: list[str] = []
        self.rows: list[Row] = []
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

    @property
    def wrong(self) -> bool:
        """Whether a test, a stage or a provider is wrong."""
        return bool(self.red or self.failures or any(row.wrong for row in self.rows))

    def write(self) -> None:
        """Write both files."""
        write_rows(self.folder / "rows.json", self.rows)
        (self.folder / "results.md").write_text(self.text())

    def text(self) -> str:
        """The page."""
        parts = [f"# {self.about['device']}", ", ".join(f"{name} {value}" for name, value in self.about.items())]
        if self.tests:
            parts.append("Tests: " + ", ".join(f"{count} {what}" for what, count in self.tests.items()) + ".")
        parts += [f"RED: {test}" for test in self.red]
        for title, table in markdown_tables(self.rows):
            parts += [f"## {title}", table]
        if self.profile:
            parts += ["## Profile of the fused step", f"```\n{self.profile}\n```"]
        parts += [f"Left out: {stage}: {why}." for stage, why in self.skipped.items()]
        parts += [f"FAILED: {stage}\n\n```\n{error}\n```" for stage, error in self.failures.items()]
        return "\n\n".join(parts) + "\n"

"""Prints what pytest-benchmark's table has no column for."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    terminalreporter.section("measured")
    for bench in session.benchmarks:
        if bench.extra_info:
            facts = ", ".join(f"{name} {value}" for name, value in bench.extra_info.items())
            terminalreporter.line(f"{bench.name}: median {bench.stats.median:.4g} s, {facts}")

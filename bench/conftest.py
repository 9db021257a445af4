"""What the benchmarks share: how much is measured, the rows of results, and the tables at the end."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.compare import Plan
from bench.rows import Row, write_rows
from bench.tables import device_of, device_slug, text_tables

ROWS = pytest.StashKey[list[Row]]()
FOLDER = Path("runs/bench")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("audiomae's benchmarks")
    group.addoption("--full", action="store_true", help="also how cost grows, and every size of the model")
    group.addoption("--short", action="store_true", help="a few rounds: is every provider right, and about how fast?")
    group.addoption("--rows", type=Path, help=f"file for the rows of results (default: {FOLDER}/DEVICE.json)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # its table has no column for a baseline: text_tables has


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.full:
        long = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture
def plan(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Plan:
    """How much is measured, through pytest-benchmark."""
    return Plan(request.config.option.full, request.config.option.short, benchmark.pedantic)


@pytest.fixture
def rows(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """Takes the rows of a test."""
    mine: list[Row] = []
    yield mine
    benchmark.extra_info["rows"] = [vars(row) for row in mine]
    request.config.stash[ROWS].extend(mine)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a CPU one thread: with more, a machine that does anything else is measured, not the operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    threads = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
    command = shlex.join([*threads, "pytest", *config.invocation_params.args])
    for row in rows:
        row.about["command"] = command
    for title, table in text_tables(rows):
        terminalreporter.section(title)
        terminalreporter.write_line(table)
    path = config.option.rows or FOLDER / f"{device_slug(device_of(rows[0]))}.json"
    write_rows(path, rows)
    terminalreporter.section("results")
    terminalreporter.write_line(f"{len(rows)} rows in {path}; python -m bench.report {path} --out DIR draws them")

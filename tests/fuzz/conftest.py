"""How many inputs the fuzz tests try, what they are drawn from, and what became of them.

``python -m pytest`` tries a few hundred, the same ones each time. ``python -m pytest tests/fuzz --inputs 20000`` draws
that many from a seed that it prints, which ``--hypothesis-seed`` takes.
"""

import json
import os
import platform
import random
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import soundfile as sf

from .fuzzing import Fuzz, Tally, shares
from .worker import Worker

INPUTS = 200
PACKAGES = ("torch", "safetensors", "soundfile", "numpy", "hypothesis")

TALLIES = pytest.StashKey[dict[str, Tally]]()
SEED = pytest.StashKey[int]()
COUNT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("audiomae's fuzzing")
    group.addoption("--inputs", type=int, help=f"inputs that all fuzz tests try together (default: {INPUTS})")
    group.addoption("--figures", type=Path, help="file for the figures, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "share(weight): a fuzz test's share of the inputs, relative to the others")
    given = config.getoption("hypothesis_seed", None)
    # The options above exist only where this folder is named on the command line.
    fresh = given == "random" or (given is None and config.getoption("inputs", None) is not None)
    config.stash[SEED] = random.randrange(2**32) if fresh else int(given or 0)
    config.stash[TALLIES] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    weights = {item: marker.args[0] for item in items if (marker := item.get_closest_marker("share"))}
    inputs = config.getoption("inputs", None) or INPUTS
    for item, count in zip(weights, shares(inputs, list(weights.values())), strict=True):
        item.stash[COUNT] = count


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, worker: Worker) -> Fuzz:
    """Tries the inputs of a test that is marked with its share of them."""
    stash = request.config.stash
    tally = stash[TALLIES].setdefault(request.node.name.removeprefix("test_"), Tally())
    return Fuzz(worker, request.node.stash[COUNT], stash[SEED], tally)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tallies = config.stash[TALLIES]
    if not tallies:
        return
    terminalreporter.section(f"fuzzing, --hypothesis-seed={config.stash[SEED]}")
    for name, tally in tallies.items():
        outcomes = ", ".join(f"{kind} {count}" for kind, count in tally.outcomes.most_common())
        terminalreporter.write_line(
            f"{name}: {tally.outcomes.total()} inputs: {outcomes}; "
            f"{tally.seconds:.1f} s, the slowest {tally.slowest:.2f} s, the largest {tally.largest:.0f} MiB"
        )
    path = config.getoption("figures", None)
    if path is None:
        return
    threads = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
    figures = {
        "command": shlex.join([*threads, "pytest", *config.invocation_params.args]),
        "seed": config.stash[SEED],
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "libsndfile": sf.__libsndfile_version__,
        "inputs": sum(tally.outcomes.total() for tally in tallies.values()),
        "tests": {name: tally.figures() for name, tally in tallies.items()},
    }
    path.write_text(json.dumps(figures, indent=2) + "\n")
    terminalreporter.write_line(f"figures in {path}")

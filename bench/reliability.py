"""Make faults befall training runs, and count what is lost.

    python -m bench.reliability --out bench/results/reliability/cpu.json      # all of them, in 25 minutes on two cores
    python -m bench.reliability --short                                       # each once or twice, in 5
    python -m bench.reliability sigkill elastic --times 5
    python -m bench.reliability --page docs/reliability.md                    # of bench/results/reliability/*.json

Every fault is made to real training commands in processes of their own, in a folder that is removed afterwards, and
what becomes of the run is compared with one that nothing befell. The exit status is 1 where anything was lost. The
file has a record of each fault, and with what and where it was made; --page writes the table of all such files, with
the figures of the fuzz tests among them (``python -m pytest tests/fuzz --inputs 20000 --figures FILE``).
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.faults.lab import Lab, References
from bench.faults.outcome import Outcome
from bench.faults.page import load, make_page
from bench.faults.scenarios import LONGEST, SCENARIOS, Scenario
from bench.provenance import provenance

COMMAND = "python -m bench.reliability"
RESULTS = Path("bench/results/reliability")


def play(scenario: Scenario, times: int, lab: Lab) -> dict[str, Any]:
    """Make a fault, and return its record.

    Args:
        scenario: The fault.
        times: How often.
        lab: Where.
    """
    print(f"{scenario.name}: {times} times ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    with lab:
        try:
            outcome = scenario.play(lab, times)
        except Exception as error:
            outcome = Outcome(lost=[f"not played to its end: {type(error).__name__}: {error}"])
    seconds = round(time.monotonic() - start)
    record = {
        "name": scenario.name,
        "fault": scenario.fault,
        "how": scenario.how,
        "command": f"{COMMAND} {scenario.name}",
        "seconds": seconds,
        **asdict(outcome),
    }
    said = "; ".join(outcome.lost) or outcome.absent or f"nothing lost, {', '.join(outcome.kept)}"
    print(f"{scenario.name}: {said} ({seconds} s)", file=sys.stderr, flush=True)
    return record


def play_all(scenarios: Sequence[tuple[Scenario, int]], folder: Path, seed: int, jobs: int) -> list[dict[str, Any]]:
    """Make several faults, and return their records.

    Args:
        scenarios: With how often to make each.
        folder: For all that is made.
        seed: Of random moments and places.
        jobs: How many to make at a time.
    """
    references = References(folder / "whole")
    labs: list[Lab] = []
    records: dict[str, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for scenario, times in sorted(scenarios, key=lambda one: one[0].name not in LONGEST):
                lab = Lab(folder / scenario.name, random.Random(f"{seed} {scenario.name}"), references)
                labs.append(lab)
                records[scenario.name] = pool.submit(play, scenario, times, lab)
            return [records[scenario.name].result() for scenario, _ in scenarios]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for lab in [*labs, *references.labs]:
                lab.close()
            raise


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(COMMAND, description="Make faults befall training runs, and count what is lost.")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"faults (default: all of {', '.join(names)})")
    parser.add_argument("--times", type=int, metavar="N", help="how often to make each (default: depends on the fault)")
    parser.add_argument("--short", action="store_true", help="make most of them once, to try this command")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="faults at a time (default: 2)")
    parser.add_argument("--seed", type=int, help="of random moments and places (default: another one each time)")
    parser.add_argument("--folder", type=Path, help="new folder for the runs, which is kept (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--page", type=Path, help="write this page instead")
    parser.add_argument("--results", type=Path, nargs="+", help=f"files for the page (default: {RESULTS}/*.json)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(names))
    if unknown:
        parser.error(f"unknown faults {', '.join(unknown)}: expected some of {', '.join(names)}")
    if options.jobs < 1 or (options.times is not None and options.times < 1):
        parser.error("--times and --jobs must be at least 1")
    try:
        if options.page is not None:
            write_page(options.page, options.results or sorted(RESULTS.glob("*.json")))
            return
        sys.exit(run(options, sys.argv[1:] if arguments is None else arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"bench.reliability: {error}")


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Make the faults that were asked for; return the exit status."""
    about = provenance(torch.device("cpu"))
    scenarios = [
        (scenario, options.times or (scenario.few if options.short else scenario.times))
        for scenario in SCENARIOS
        if not options.names or scenario.name in options.names
    ]
    seed = random.randrange(2**32) if options.seed is None else options.seed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="reliability-"))
    start = time.monotonic()
    try:
        records = play_all(scenarios, folder, seed, options.jobs)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - start)
    if options.out is not None:
        command = shlex.join([*COMMAND.split(), *arguments])
        content = {"command": command, "seed": seed, "seconds": seconds, "about": about, "faults": records}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=2) + "\n")
    failed = [record["name"] for record in records if record["lost"]]
    print(f"{len(records) - len(failed)} of {len(records)} faults cost nothing, in {seconds} s", file=sys.stderr)
    return 1 if failed else 0


def write_page(page: Path, paths: Sequence[Path]) -> None:
    """Write the page of some results.

    Raises:
        ValueError: There are none, or they are something else.
    """
    if not paths:
        raise ValueError(f"no results in {RESULTS}: make some with --out {RESULTS}/NAME.json")
    command = f"{COMMAND} --page {page.as_posix()} --results {' '.join(path.as_posix() for path in paths)}"
    text = make_page(*load(paths), command)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()

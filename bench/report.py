"""Draw the results that ``pytest bench/ --benchmark-only`` wrote.

    python -m bench.report RESULTS... --out docs/
    python -m bench.report RESULTS... --out docs/ --readme README.md kernels/README.md

Writes a page with tables and plots for each device, ``OUT/benchmarks/DEVICE.md``; an index of them; and what
pre-training would cost, ``OUT/cost.md``. With ``--readme`` also what stands between ``<!-- performance -->`` and
``<!-- /performance -->`` there, and between the markers ``drop-in``. All of it is made from the files given, so give
all. Files of the same device are runs of the same measurements: the first is shown, and its page says which ratios the
later ones reproduce.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.cost import cost_page
from bench.plots import draw, save_figure
from bench.readme import drop_in_section, fill, performance_section
from bench.rows import Row, read_rows
from bench.tables import (
    build_tables,
    describe_about,
    describe_task,
    device_of,
    device_slug,
    format_ratio,
    key_of,
    markdown,
    markdown_table,
)

COMMAND = "python -m bench.report"

HOW = """\
Providers take turns: in a round each runs once, so that what else the machine does falls on all of them. A ratio is
the baseline's time over the provider's in the same round, and above 1 the provider is faster. Times and ratios are
medians over rounds, with their 20th and 80th percentile; a quotient of medians need not be the median of ratios.
Warm-up, tuning and compilation come before, and are not in the times; `compile` is what the first call took longer.

An operator's inputs are random and rotate through copies of 256 MiB together, which is more than a last-level cache
holds, but no more than sixteen copies. On a GPU an operator is timed by the device alone, a step from its start to the
end of its last kernel. Under torch.compile an operator is one graph, and a model is compiled block by block. A provider
that is out of tolerance against float64 is shown as wrong, and one that is not here as absent, without a time.

`share of ceiling` is the time that the device needs for the least bytes and the least FLOPs of an operator, at the
rates of the copy and the matrix product that the same run measured, over the median time; `memory` or `compute` is
which of the two bounds. `peak` is the most memory in use above what was there before, `saved` what autograd keeps for
backward.
"""


@dataclass
class Device:
    """What is known of a device.

    Attributes:
        name: The device's.
        runs: Rows by file.
    """

    name: str
    runs: dict[Path, list[Row]] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """Rows of the first run, and of later ones what those before them lack."""
        shown: list[Row] = []
        for run in self.runs.values():
            known = {key_of(row) for row in shown}
            shown += [row for row in run if key_of(row) not in known]
        return shown

    def repeated(self) -> list[tuple[Row, Row]]:
        """Ratios that were measured more than once: the first row, and each later one."""
        pairs: list[tuple[Row, Row]] = []
        firsts: dict[tuple[object, ...], Row] = {}
        for run in self.runs.values():
            ratios = {key_of(row): row for row in run if row.ratio is not None and row.provider != row.baseline}
            pairs += [(firsts[key], row) for key, row in ratios.items() if key in firsts]
            firsts = ratios | firsts
        return pairs


def load(paths: Sequence[Path]) -> list[Device]:
    """Read files, and sort them by device.

    Raises:
        ValueError: A file that is missing, is given twice, or holds no rows.
    """
    devices: dict[str, Device] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is no file, expected rows of results, as pytest bench/ writes them")
        if any(path.samefile(other) for device in devices.values() for other in device.runs):
            raise ValueError(f"{path} is given twice, expected another run")
        rows = read_rows([path])
        if not rows:
            raise ValueError(f"{path} holds no rows of results, expected at least one")
        for row in rows:
            name = device_of(row)
            devices.setdefault(name, Device(name)).runs.setdefault(path, []).append(row)
    return list(devices.values())


def agreement(device: Device) -> str:
    """Say how far the ratios of several runs agree."""
    pairs = device.repeated()
    if not pairs:
        return "The files have no ratio in common."
    outside, overlapping = [], 0
    for first, later in pairs:
        assert first.ratio is not None
        assert later.ratio is not None
        low, high = first.ratio_p20 or first.ratio, first.ratio_p80 or first.ratio
        if low <= later.ratio <= high:
            continue
        overlaps = (later.ratio_p20 or later.ratio) <= high and low <= (later.ratio_p80 or later.ratio)
        overlapping += overlaps
        measured = f"{first.suite}: {describe_task(first)}"
        mode = "" if first.mode == "all" else first.mode
        ratios = [format_ratio(first), format_ratio(later)]
        outside.append([measured, first.provider, mode, *ratios, "overlap" if overlaps else "apart"])
    text = (
        f"Of {len(pairs)} ratios, {len(pairs) - len(outside)} reproduce within their spread: the median of a later run "
        f"lies between the 20th and the 80th percentile of the first's."
    )
    if not outside:
        return text
    text += f" Of the other {len(outside)}, the spreads of {overlapping} overlap."
    head = ["outside", "provider", "mode", "first", "later", "spreads"]
    return f"{text}\n\n{markdown(head, outside, text_columns=3)}"


def write_device_page(device: Device, page: Path) -> None:
    """Write a device's page, and its plots in a folder of the page's name, in place of those that are there."""
    plots = page.with_suffix("")
    for old in plots.glob("*.png"):
        old.unlink()
    rows = device.rows
    parts = [
        f"# {device.name}",
        markdown(["file", "with"], [[f"`{path.name}`", describe_about(run)] for path, run in device.runs.items()]),
    ]
    if len(device.runs) > 1:
        parts.append("Tables and plots show the first file, and of the others what it lacks.")
        parts += ["## Runs against each other", agreement(device)]
    parts += ["## How it was measured", HOW.strip(), _rounds(rows), "## Results"]
    for table in build_tables(rows):
        parts += [f"### {table.title}", markdown_table(table)]
        for what, figure in () if table.detail else draw(table.rows, rows):
            path = plots / f"{device_slug(f'{table.title} {what}')}.png"
            save_figure(figure, path)
            parts.append(f"![{what}, {table.title}]({plots.name}/{path.name})")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _rounds(rows: Iterable[Row]) -> str:
    """How often each suite went round."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        if row.rounds:
            counts.setdefault(row.suite, []).append(row.rounds)
    said = [
        f"{suite} {min(each)}" + (f" to {max(each)}" if max(each) > min(each) else "") for suite, each in counts.items()
    ]
    return f"Rounds: {', '.join(said)}." if said else "Nothing was timed."


def index_page(devices: Iterable[Device]) -> str:
    """List the devices' pages."""
    lines = []
    for device in devices:
        suites = ", ".join(dict.fromkeys(row.suite for row in device.rows))
        link = f"[{device.name}]({device_slug(device.name)}.md)"
        lines.append([link, suites, describe_about(device.rows)])
    text = (
        "What `pytest bench/ --benchmark-only` measured, a page for each device, written by `python -m bench.report`."
    )
    parts = ["# Benchmarks", text, markdown(["device", "measured", "with"], lines, text_columns=3)]
    parts.append("[What pre-training costs](../cost.md) follows from the training step.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(COMMAND, description="Draw results of benchmarks.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="file that pytest bench/ wrote")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pages (default: docs)")
    parser.add_argument(
        "--readme", type=Path, nargs="+", default=[], help="files whose sections between markers are written anew"
    )
    options = parser.parse_args()
    try:
        write_report(options.results, options.out, options.readme)
    except (OSError, ValueError) as error:
        sys.exit(f"bench.report: {error}")


def write_report(results: Sequence[Path], out: Path, readmes: Sequence[Path] = ()) -> None:
    """Write all pages, and say which.

    Args:
        results: Files of rows.
        out: Folder for the pages; made if missing.
        readmes: Files with markers.

    Raises:
        ValueError: Files that hold no rows, or a README without markers; then nothing is written.
        OSError: A file cannot be read or written.
    """
    devices = load(results)
    folder = out / "benchmarks"
    pages = {device.name: folder / f"{device_slug(device.name)}.md" for device in devices}
    command = " ".join([COMMAND, *(path.as_posix() for path in results), "--out", out.as_posix()])
    if readmes:
        command += " ".join([" --readme", *(path.as_posix() for path in readmes)])
    filled = {}
    rows = {device.name: device.rows for device in devices}
    for readme in readmes:
        links = {name: Path(os.path.relpath(page, readme.parent)).as_posix() for name, page in pages.items()}
        cost = Path(os.path.relpath(out / "cost.md", readme.parent)).as_posix()
        sections = {
            "performance": performance_section(rows, links, cost, command),
            "drop-in": drop_in_section(rows, command),
        }
        filled[readme] = fill(readme.read_bytes().decode(), sections, readme)
    folder.mkdir(parents=True, exist_ok=True)
    for device in devices:
        write_device_page(device, pages[device.name])
    (folder / "README.md").write_text(index_page(devices), encoding="utf-8")
    (out / "cost.md").write_text(cost_page(row for device in devices for row in device.rows), encoding="utf-8")
    for readme, text in filled.items():
        readme.write_bytes(text.encode())
    for path in (*pages.values(), folder / "README.md", out / "cost.md", *filled):
        print(path)


if __name__ == "__main__":
    main()

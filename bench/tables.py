"""Rows of results as tables, for a terminal and for Markdown."""

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.rows import Row

WIDTH = 140
"""Characters that a table takes in a terminal at most."""

WHOLE = ("both", "all")
"""Modes that are everything that a provider does."""

PART_MODES = ("forward", "backward")
PARTS = ("masks", "encoder", "decoder", "loss", "optimiser")
"""Facts that are shares of a step's time."""


@dataclass
class Line:
    """What one provider did.

    Attributes:
        group: What is done, with the sizes that tell it from others in the table.
        row: What it was made from.
        cells: Text by column; empty where there is nothing to say.
        note: Stands in place of the cells.
    """

    group: str
    row: Row
    cells: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def provider(self) -> str:
        """Who did it."""
        return self.row.provider


@dataclass
class Table:
    """Rows that are read together.

    Attributes:
        title: What they have in common.
        rows: What they were made from.
        lines: In the order of the rows.
        detail: Whether it tells more of another table's rows.
    """

    title: str
    rows: list[Row]
    lines: list[Line]
    detail: bool = False

    @property
    def columns(self) -> list[str]:
        """Columns in which some line says something."""
        names = dict.fromkeys(name for line in self.lines for name in line.cells)
        return [name for name in names if any(line.cells.get(name) for line in self.lines)]


def device_slug(name: str) -> str:
    """Make the name of a device that of a file, as ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_of(row: Row) -> str:
    """Name of the device that a row was measured on."""
    return str(row.about.get("device", "an unknown device"))


def is_gpu(row: Row) -> bool:
    """Whether a row was measured on a GPU: there, provenance holds a driver."""
    return "driver" in row.about


def sizes_of(row: Row) -> dict[str, object]:
    """The shape and, on a processor, the threads: with fewer it is another measurement."""
    threads = {} if is_gpu(row) or "threads" not in row.about else {"threads": row.about["threads"]}
    return row.shape | threads


def key_of(row: Row) -> tuple[object, ...]:
    """What two runs of the same measurement have in common."""
    sizes = tuple(sorted((name, str(size)) for name, size in sizes_of(row).items()))
    return device_of(row), row.suite, row.task, row.provider, row.mode, sizes, row.dtype, row.varies


def main_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of no series that are about everything that a provider does."""
    return [row for row in rows if row.varies is None and row.mode in WHOLE]


def together(rows: Iterable[Row]) -> list[Row]:
    """Rows of a task one after the other, the tasks in the order in which they appear."""
    rows = list(rows)
    order = {task: place for place, task in enumerate(dict.fromkeys(row.task for row in rows))}
    return sorted(rows, key=lambda row: order[row.task])


def format_number(value: float) -> str:
    """Three significant digits, and no exponent."""
    value = float(f"{value:.3g}") if abs(value) < 1000 else value
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def format_times(*milliseconds: float) -> list[str]:
    """Times in the unit that fits the first of them, which alone names it."""
    first = milliseconds[0]
    unit, scale = ("s", 1e-3) if first >= 1e3 else ("ms", 1.0) if first >= 1 else ("µs", 1e3)
    numbers = [format_number(ms * scale) for ms in milliseconds]
    return [f"{numbers[0]} {unit}", *numbers[1:]]


def format_time(row: Row, *, spread: bool = True) -> str:
    """Median time, with its 20th and 80th percentile."""
    if row.p50_ms is None:
        return ""
    if row.p20_ms is None or row.p80_ms is None or not spread:
        return format_times(row.p50_ms)[0]
    middle, low, high = format_times(row.p50_ms, row.p20_ms, row.p80_ms)
    return f"{middle} ({low} to {high})"


def format_ratio(row: Row, *, spread: bool = True) -> str:
    """Ratio over the baseline, with its 20th and 80th percentile; the baseline's own is 1 and has none."""
    if row.ratio is None:
        return ""
    if row.provider == row.baseline:
        return "1x"
    bounds = f" ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})" if spread and row.ratio_p20 and row.ratio_p80 else ""
    return f"{row.ratio:.2f}x{bounds}"


def format_share(share: float) -> str:
    """Percent."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def format_mib(mib: float | None) -> str:
    """Memory in the unit that fits."""
    if mib is None:
        return ""
    unit, scale = ("GiB", 1 / 1024) if mib >= 1024 else ("KiB", 1024) if 0 < mib < 1 else ("MiB", 1)
    return f"{format_number(mib * scale)} {unit}"


def format_ceiling(row: Row) -> str:
    """Share of what the device reaches, and whether its copy or its matrix product is what bounds."""
    return "" if row.ceiling_share is None else f"{format_share(row.ceiling_share)} {row.bound or ''}".rstrip()


def format_fact(name: str, value: object) -> str:
    """A rate, which has a slash in its name, is a number; another fraction is a share."""
    if isinstance(value, float):
        return format_number(value) if "/" in name else format_share(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def describe_sizes(sizes: dict[str, object]) -> str:
    """Sizes with their names, as ``batch 8, tokens 103``."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def describe_task(row: Row) -> str:
    """A task with its sizes."""
    return ", ".join(filter(None, (row.task, describe_sizes(sizes_of(row)))))


def describe_about(rows: Iterable[Row]) -> str:
    """What rows were measured with, but for the device; where they differ, everything that occurs."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, value in row.about.items():
            if name not in ("device", "command"):
                found.setdefault(name, {})[str(value)] = None
    return ", ".join(f"{name} {' and '.join(values)}" for name, values in found.items())


def build_tables(rows: Iterable[Row]) -> list[Table]:
    """Sort rows into tables: one for each suite, precision and, of operators, batch; and one for each kind of growth.

    A row that is there twice, as ceilings are that two tests needed, is shown once.
    """
    distinct: list[Row] = []
    for row in rows:
        if row not in distinct:
            distinct.append(row)
    several_devices = len({device_of(row) for row in distinct}) > 1
    tables: dict[tuple[object, ...], list[Row]] = {}
    for row in distinct:
        batch = row.shape.get("batch") if row.suite == "operators" and row.varies != "batch" else None
        dtype = None if row.suite == "ceilings" else row.dtype
        tables.setdefault((device_of(row), row.suite, dtype, row.varies, batch), []).append(row)
    built = []
    for mine in tables.values():
        built.append(_build_table(together(mine), several_devices))
        if any(part in row.facts for row in mine for part in PARTS):
            built.append(_shares_table(built[-1]))
    return built


def _build_table(rows: list[Row], name_device: bool) -> Table:
    first = rows[0]
    shared = {
        name: size
        for name, size in sizes_of(first).items()
        if all(sizes_of(row).get(name) == size for row in rows) and name != first.varies
    }
    what = first.suite + " forward + backward" * any(row.mode == "both" for row in rows)
    said = [device_of(first)] * name_device + [what + (f" by {first.varies}" if first.varies else "")]
    said += [first.dtype] * (first.suite != "ceilings") + [describe_sizes(shared)] * bool(shared)
    baselines = {row.baseline for row in rows}
    over = f"over {first.baseline}" if len(baselines) == 1 else "over baseline"
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        own = {name: size for name, size in sizes_of(row).items() if name not in shared}
        precision = [row.dtype] * (row.suite == "ceilings" and row.task != "copy")
        group = ", ".join([row.task, *precision, *([describe_sizes(own)] if own else [])])
        groups.setdefault(group, {}).setdefault(row.provider, []).append(row)
    lines = [
        line
        for group, by_provider in groups.items()
        for line in sorted(
            (line for mine in by_provider.values() for line in _lines(group, mine, over)),
            key=lambda line: bool(line.note),
        )
    ]
    return Table(", ".join(said), rows, lines)


def _lines(group: str, rows: list[Row], over: str) -> list[Line]:
    """One line for all modes of a provider, or one for each where none of them is the whole."""
    whole = [row for row in rows if row.mode in WHOLE]
    parts = {row.mode: row for row in rows if row not in whole} if whole else {}
    lines = []
    for row in whole or rows:
        reason = f"wrong: {row.wrong}" if row.wrong else f"absent: {row.absent}" if row.absent else ""
        if reason:
            lines.append(Line(group, row, note=" ".join(reason.split())))
            continue
        rates = {name: format_fact(name, value) for name, value in row.facts.items() if "/" in name}
        others = {
            name: format_fact(name, value)
            for name, value in row.facts.items()
            if name not in rates and name not in PARTS
        }
        cells = {
            "mode": "" if row.mode in WHOLE else row.mode,
            "median (p20 to p80)": format_time(row),
            over: format_ratio(row),
            **{
                mode: format_ratio(parts[mode], spread=False) if mode in parts else ""
                for mode in ("forward", "backward")
            },
            **rates,
            "share of ceiling": format_ceiling(row),
            "peak": format_mib(row.peak_mib),
            "saved": format_mib(row.saved_mib),
            "error": "" if row.error is None else f"{row.error:.1e}",
            "compile": "" if row.compile_s is None else format_times(1e3 * row.compile_s)[0],
            **others,
        }
        lines.append(Line(group, row, cells))
    return lines


def _shares_table(table: Table) -> Table:
    lines = [
        Line(
            line.group,
            line.row,
            {"median": format_time(line.row, spread=False)}
            | {part: format_fact(part, line.row.facts[part]) for part in PARTS if part in line.row.facts},
        )
        for line in table.lines
        if any(part in line.row.facts for part in PARTS)
    ]
    return Table(f"{table.title}: where the time goes", [line.row for line in lines], lines, detail=True)


def text_tables(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Make tables for a terminal.

    Returns:
        Title and text of each, of lines of at most :data:`WIDTH` characters.
    """
    return [(table.title, _text(table)) for table in build_tables(rows)]


def _text(table: Table) -> str:
    columns = table.columns
    indent = "  "
    first = max(len(line.provider) for line in table.lines)
    widths = {
        name: max(min(len(name), 11), *map(len, name.split()), *(len(line.cells.get(name, "")) for line in table.lines))
        for name in columns
    }
    heads = {name: textwrap.wrap(name, widths[name]) for name in columns}
    height = max(map(len, heads.values()), default=0)

    def joined(provider: str, cells: Iterable[str]) -> str:
        aligned = [f"{cell:>{widths[name]}}" for name, cell in zip(columns, cells, strict=True)]
        return "  ".join([indent + f"{provider:<{first}}", *aligned]).rstrip()

    lines = []
    for level in range(height):
        lines.append(joined("", (([""] * height + heads[name])[len(heads[name]) + level] for name in columns)))
    group = None
    for line in table.lines:
        if line.group != group:
            group = line.group
            lines.append(group)
        if line.note:
            start = indent + f"{line.provider:<{first}}  "
            lines += textwrap.wrap(line.note, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
        else:
            lines.append(joined(line.provider, (line.cells.get(name, "") for name in columns)))
    return "\n".join(lines)


def markdown_tables(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Make the same tables as Markdown.

    Returns:
        Title and text of each.
    """
    return [(table.title, markdown_table(table)) for table in build_tables(rows)]


def markdown_table(table: Table) -> str:
    """Make a table Markdown; a reason stands in the first column that would have had numbers."""
    columns = table.columns
    lines, group = [], None
    for line in table.lines:
        cells = [line.note] + [""] * (len(columns) - 1) if line.note else [line.cells.get(c, "") for c in columns]
        lines.append(["" if line.group == group else line.group, line.provider, *cells])
        group = line.group
    # With providers that are all absent there are no columns, but there are reasons.
    return markdown(["", "provider", *(columns or [""])], lines)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], *, text_columns: int = 2) -> str:
    """Join cells to a Markdown table, of which the first ``text_columns`` are text and the others numbers."""
    rule = ["---" if index < text_columns else "---:" for index in range(len(head))]
    shown = [head, rule, *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)

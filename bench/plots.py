"""Rows of results as pictures."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from bench.rows import Row
from bench.tables import (
    PARTS,
    WHOLE,
    describe_sizes,
    format_mib,
    format_number,
    format_time,
    is_gpu,
    main_rows,
    sizes_of,
)

DPI = 120
# Colours of Okabe and Ito, which people with any colour vision can tell apart; relatives differ by their markers.
STYLES = {
    "reference": ("#000000", "o"),
    "reference + compile": ("#E69F00", "s"),
    "reference + max-autotune": ("#8C6D00", "s"),
    "fused": ("#0072B2", "D"),
    "fused + compile": ("#56B4E9", "^"),
    "fused + max-autotune": ("#7B3FA0", "^"),
    "timm": ("#009E73", "X"),
    "sdpa": ("#CC79A7", "P"),
    "sdpa-flash": ("#CC79A7", "<"),
    "sdpa-cudnn": ("#CC79A7", ">"),
    "sdpa-efficient": ("#CC79A7", "v"),
    "fa2": ("#D55E00", "<"),
    "fa3": ("#D55E00", ">"),
    "fa4": ("#D55E00", "v"),
    "math": ("#888888", "h"),
}
"""Colour and marker by provider."""

OTHER_COLOURS, OTHER_MARKERS = ("#009E73", "#CC79A7", "#D55E00"), "dp*8"
PART_COLOURS = dict(zip(PARTS, ("#1b1b1b", "#3b528b", "#8fb0d8", "#c9b458", "#a0522d"), strict=True))
REST_COLOUR = "#bbbbbb"

Value = Callable[[Row], float | None]


def style_of(provider: str) -> dict[str, Any]:
    """Colour and marker of a provider: the same in every plot, whoever else is in it."""
    if provider in STYLES:
        colour, marker = STYLES[provider]
    else:
        number = zlib.crc32(provider.encode())
        colour, marker = OTHER_COLOURS[number % 3], OTHER_MARKERS[number // 3 % 4]
    return {"color": colour, "marker": marker, "markeredgecolor": "white", "markeredgewidth": 0.4, "linestyle": "none"}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, format="png")


def draw(rows: Sequence[Row], everything: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """Draw a table's rows.

    Args:
        rows: Of one suite and device, as :func:`bench.tables.build_tables` puts them together.
        everything: All rows of the device: among them are the ceilings, and the members that a series shares with
            the main rows.

    Yields:
        What each picture shows, and the picture.
    """
    first = rows[0]
    if first.varies and any(row.p50_ms for row in rows):
        yield f"time by {first.varies}", growth_figure(rows, first.varies, everything)
        return
    timed = [row for row in main_rows(rows) if row.p50_ms]
    if first.suite == "operators":
        if any(row.ratio and row.provider != row.baseline for row in timed):
            yield f"speed-up over {first.baseline}", speedup_figure(timed)
        if any(row.tflop_per_s or row.gb_per_s for row in timed):
            yield "roofline", roofline_figure(timed, everything)
    if first.suite == "steps" and timed:
        yield "time of a step", steps_figure(timed)
    if first.suite in ("operators", "steps") and any(row.peak_mib or row.saved_mib for row in timed):
        yield "memory", memory_figure(timed)


def label_of(row: Row, rows: Sequence[Row]) -> str:
    """A task's name, with the sizes that tell it from others of its name."""
    same = [sizes_of(other) for other in rows if other.task == row.task]
    own = {name: size for name, size in sizes_of(row).items() if any(sizes.get(name) != size for sizes in same)}
    return row.task + (f"\n{describe_sizes(own)}" if own else "")


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by label."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label_of(row, rows), []).append(row)
    return list(groups.items())


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _legend(figure: Figure, rows: Iterable[Row]) -> None:
    providers = list(dict.fromkeys(row.provider for row in rows))
    order = [name for name in STYLES if name in providers] + [name for name in providers if name not in STYLES]
    handles = [Line2D([], [], label=provider, markersize=8, **style_of(provider)) for provider in order]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(order), 6), frameon=False)


def _height(groups: list[tuple[str, list[Row]]]) -> float:
    return 1.5 + 0.19 * sum(len(mine) + 1 for _, mine in groups)


def _dots(
    axis: Axes,
    groups: list[tuple[str, list[Row]]],
    value: Value,
    text: Callable[[Row], str],
    *,
    spread: Callable[[Row], tuple[float, float]] | None = None,
) -> None:
    """Draw a line for each row, with a band for each group, the first on top, on a logarithmic axis.

    Zero, which the axis lacks, is drawn at its left end.
    """
    values = [v for _, mine in groups for row in mine if (v := value(row))]
    ends = [end for _, mine in groups for row in mine if spread and value(row) for end in spread(row)]
    low, high = min([*values, *ends], default=1.0), max([*values, *ends], default=1.0)
    left, right = low / (high / low) ** 0.06 / 1.05, high * (high / low) ** 0.22 * 1.1
    top, ticks = 0.0, []
    for index, (_, mine) in enumerate(groups):
        if index % 2 == 0:
            axis.axhspan(top - 0.5, top + len(mine) + 0.5, color="0.955", zorder=0)
        ticks.append(top + len(mine) / 2)
        for place, row in enumerate(mine):
            found, y = value(row), top + place + 0.5
            if found is None:
                continue
            end = found or left
            if spread is not None:
                before, end = spread(row)
                axis.plot([before, end], [y, y], color=style_of(row.provider)["color"], linewidth=1.6, zorder=2)
            axis.plot(found or left, y, markersize=7, zorder=3, clip_on=False, **style_of(row.provider))
            note = axis.annotate(text(row), (end, y), (6, 0), textcoords="offset points", va="center", fontsize=7.5)
            note.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6})
        top += len(mine) + 1
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(top - 0.5, -0.5)
    axis.set_yticks(ticks, [label for label, _ in groups], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.85", linewidth=0.6)
    axis.set_axisbelow(True)
    _plain_ticks(axis.xaxis, left, right)


def _plain_ticks(axis: Axis, low: float, high: float) -> None:
    """A few round numbers on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= 8:
            break
    axis.set_ticks(ticks, labels=[f"{tick:,g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def speedup_figure(rows: Sequence[Row]) -> Figure:
    """Draw how much faster than the baseline each provider is, with the ratios' 20th and 80th percentile."""
    mine = [row for row in rows if row.ratio and row.provider != row.baseline]
    groups = _groups(mine)
    figure = _figure(9.5, _height(groups))
    axis = figure.subplots()
    _dots(
        axis,
        groups,
        lambda row: row.ratio,
        lambda row: f"{row.ratio:.2f}",
        spread=lambda row: (row.ratio_p20 or row.ratio or 1, row.ratio_p80 or row.ratio or 1),
    )
    axis.axvline(1, color="black", linewidth=1.2, zorder=1)
    axis.set_xlabel(f"times as fast as {mine[0].baseline}: median of pairs, 20th to 80th percentile")
    _legend(figure, mine)
    return figure


def memory_figure(rows: Sequence[Row]) -> Figure:
    """Draw the peak and what is saved for backward."""
    groups = _groups(rows)
    figure = _figure(12.5, _height(groups))
    left, right = figure.subplots(1, 2, sharey=True)
    _dots(left, groups, lambda row: row.peak_mib, lambda row: format_mib(row.peak_mib))
    left.set_xlabel("peak above what was there before, MiB")
    _dots(right, groups, lambda row: row.saved_mib, lambda row: format_mib(row.saved_mib))
    right.set_xlabel("saved for backward, MiB")
    _legend(figure, rows)
    return figure


def find_ceiling(rows: Iterable[Row], what: str, like: Row) -> float | None:
    """Find a rate that was measured under the conditions of a row, ``"GB/s"`` or ``"TFLOP/s"``."""
    for row in rows:
        same_threads = is_gpu(like) or row.about.get("threads") == like.about.get("threads")
        same_dtype = what == "GB/s" or row.dtype == like.dtype
        if row.suite == "ceilings" and what in row.facts and same_threads and same_dtype:
            return float(row.facts[what])
    return None


def roofline_figure(rows: Sequence[Row], ceilings: Iterable[Row]) -> Figure:
    """Draw achieved rates under those that the device reaches: FLOPs, and bytes of what multiplies no matrices."""
    ceilings = list(ceilings)
    copy, product = (find_ceiling(ceilings, what, rows[0]) for what in ("GB/s", "TFLOP/s"))
    computing = [row for row in rows if row.least_flops and row.least_bytes and row.tflop_per_s]
    moving = [row for row in rows if not row.least_flops and row.gb_per_s]
    groups = _groups(moving)
    figure = _figure(14, max(6.2, _height(groups)))
    if computing and moving:
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    else:
        left = right = figure.subplots()
    if computing:
        _draw_roof(left, computing, copy, product)
    if moving:
        _dots(right, groups, lambda row: row.gb_per_s, lambda row: format_number(row.gb_per_s or 0))
        if copy:
            low, high = right.get_xlim()
            right.set_xlim(min(low, 0.9 * copy), max(high, 1.5 * copy))
            _plain_ticks(right.xaxis, *right.get_xlim())
            right.axvline(copy, color="0.35", linewidth=1.4)
            right.set_title(f"line: a copy, {format_number(copy)} GB/s", fontsize=10)
        right.set_xlabel("least bytes over median time, GB/s")
    _legend(figure, computing + moving)
    return figure


def _draw_roof(axis: Axes, rows: Sequence[Row], copy: float | None, product: float | None) -> None:
    intensity = {label: mine[0].least_flops / mine[0].least_bytes for label, mine in _groups(rows)}  # type: ignore[operator]
    low, high = min(intensity.values()) / 2.5, max(intensity.values()) * 2.5
    rates = [row.tflop_per_s or 0 for row in rows]
    bottom, top = min(rates) / 2, max(rates) * 2
    if copy and product:
        ridge = 1e3 * product / copy
        low, high = min(low, ridge / 3), max(high, ridge * 3)
        axis.plot([low, ridge, high], [low * copy / 1e3, product, product], color="0.35", linewidth=1.6, zorder=1)
        limits = f"roof: a copy, {format_number(copy)} GB/s, and a matrix product, {format_number(product)} TFLOP/s"
        axis.set_title(limits, fontsize=10)
        bottom, top = min(bottom, low * copy / 1e3), max(top, 1.5 * product)
    axis.set(xscale="log", yscale="log", xlabel="least FLOPs per least byte")
    axis.set_ylabel("least FLOPs over median time, TFLOP/s")
    # Labels stand above the plot's points, in a band of their own, apart by at least a line's height.
    room = (top / bottom) ** 0.5
    axis.set(xlim=(low, high), ylim=(bottom, top * room))
    gap = math.log(high / low) / 26
    places: list[float] = []
    names = sorted(intensity, key=lambda label: intensity[label])
    for name in names:
        here = math.log(intensity[name])
        places.append(max(here, places[-1] + gap) if places else here)
    shift = max(0.0, places[-1] - (math.log(high) - gap))
    for name, place in zip(names, places, strict=True):
        x = math.exp(place - shift)
        best = max(row.tflop_per_s or 0 for row in rows if label_of(row, rows) == name)
        axis.plot([intensity[name], x], [best, top], color="0.75", linewidth=0.7, zorder=0)
        text = name.replace("\n", ", ")
        axis.text(x, top * 1.08, text, rotation=90, ha="center", va="bottom", fontsize=8, clip_on=True)
    for row in rows:
        place = intensity[label_of(row, rows)]
        axis.plot(place, row.tflop_per_s or 0, markersize=7, zorder=3, **style_of(row.provider))
    axis.grid(color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    _plain_ticks(axis.xaxis, low, high)
    _plain_ticks(axis.yaxis, bottom, top)


def steps_figure(rows: Sequence[Row]) -> Figure:
    """Draw the time of steps, divided where it is known among their parts."""
    groups = _groups(rows)
    figure = _figure(10, 1.1 + sum(0.45 * len(mine) + 0.6 for _, mine in groups))
    heights = [len(mine) + 1 for _, mine in groups]
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (task, mine) in zip(axes, groups, strict=True):
        longest = max(row.p50_ms or 0 for row in mine)
        unit, scale = ("s", 1e-3) if longest >= 1e3 else ("ms", 1.0)
        for y, row in enumerate(mine):
            total, start = scale * (row.p50_ms or 0), 0.0
            shares = {part: row.facts[part] for part in PARTS if part in row.facts}
            for part, share in (shares or {"": 1.0}).items():
                colour = PART_COLOURS.get(part, REST_COLOUR)
                axis.barh(y, total * share, left=start, height=0.72, color=colour, edgecolor="white", linewidth=0.5)
                if part and total * share > 0.04 * longest * scale:
                    middle, ink = start + total * share / 2, "black" if part in ("decoder", "loss") else "white"
                    axis.text(middle, y, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
                start += total * share
            ends = [scale * (end or row.p50_ms or 0) for end in (row.p20_ms, row.p80_ms)]
            axis.plot(ends, [y + 0.44, y + 0.44], color="black", linewidth=1.4, solid_capstyle="butt")
            text = format_time(row, spread=False)
            axis.annotate(text, (max(*ends, total), y), (7, 0), textcoords="offset points", va="center", fontsize=9)
        axis.set_yticks(range(len(mine)), [row.provider for row in mine])
        axis.set_ylim(len(mine) - 0.45, -0.45)
        widest = max(row.p80_ms or row.p50_ms or 0 for row in mine)
        axis.set_xlim(0, 1.13 * scale * widest)
        axis.set_title(task.replace("\n", ", "), fontsize=10, loc="left")
        axis.set_xlabel(unit, loc="right", labelpad=0)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("median time of a step; line below a bar: 20th to 80th percentile", fontsize=10)
    named = {part: PART_COLOURS[part] for part in PARTS if any(part in row.facts for row in rows)}
    if any(not any(part in row.facts for part in PARTS) for row in rows):
        named["not divided"] = REST_COLOUR
    handles = [Line2D([], [], label=name, color=c, marker="s", markersize=9, linestyle="") for name, c in named.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _size(row: Row, varies: str) -> float:
    """The size that a series grows in; of a window its tokens."""
    return float(math.prod(float(part) for part in str(row.shape[varies]).split("x")))


def growth_figure(rows: Sequence[Row], varies: str, everything: Sequence[Row]) -> Figure:
    """Draw the time of each operator against a size, both axes logarithmic.

    Args:
        rows: Of the series.
        varies: The size.
        everything: Rows among which are main rows that differ from a series in this size only: they belong to it.
    """

    def series_of(row: Row) -> tuple[object, ...]:
        others = tuple((name, size) for name, size in sizes_of(row).items() if name != varies)
        return row.task, row.provider, row.dtype, others

    mine = [row for row in rows if row.p50_ms and row.mode in WHOLE]
    known = {series_of(row) for row in mine}
    timed = mine + [row for row in main_rows(everything) if row.p50_ms and series_of(row) in known]
    tasks = list(dict.fromkeys(row.task for row in timed))
    columns = min(4, max(len(tasks), 1))
    lines = math.ceil(max(len(tasks), 1) / columns)
    figure = _figure(3.2 * columns, 0.8 + 2.6 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, task in zip(axes, tasks, strict=False):
        mine = sorted((row for row in timed if row.task == task), key=lambda row: _size(row, varies))
        for provider in dict.fromkeys(row.provider for row in mine):
            series = [row for row in mine if row.provider == provider]
            sizes = [_size(row, varies) for row in series]
            style = style_of(provider) | {"linestyle": "-", "linewidth": 1.4, "markersize": 6}
            axis.plot(sizes, [row.p50_ms or 0 for row in series], **style)
            low, high = ([getattr(row, end) or row.p50_ms for row in series] for end in ("p20_ms", "p80_ms"))
            axis.fill_between(sizes, low, high, color=style["color"], alpha=0.2, linewidth=0)
        ticks = {_size(row, varies): str(row.shape[varies]) for row in mine}
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
        axis.xaxis.set_minor_locator(NullLocator())
        _plain_ticks(axis.yaxis, *axis.get_ylim())
        axis.set_title(task, fontsize=10)
        axis.grid(color="0.9", linewidth=0.6)
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    figure.supxlabel(varies)
    figure.supylabel("median time, ms")
    _legend(figure, timed)
    return figure

"""The sections of measured figures in READMEs, made from rows so that none is typed by hand."""

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike

from bench.rows import Row
from bench.tables import (
    describe_about,
    describe_sizes,
    describe_task,
    format_fact,
    format_mib,
    format_number,
    format_ratio,
    format_share,
    format_time,
    main_rows,
    markdown,
    sizes_of,
    together,
)

SECTIONS = ("performance", "drop-in")
"""Names of the sections: each stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

COMMAND = "pytest bench/ --benchmark-only"
REFERENCE, COMPILED, FUSED = "reference", "reference + compile", "fused"


def fill(text: str, sections: Mapping[str, str], path: str | PathLike[str]) -> str:
    """Put sections between their markers in a text, and leave the rest as it is.

    Args:
        text: Of the file.
        sections: By name; those without markers in the text are left out.
        path: Names the file in errors.

    Raises:
        ValueError: A section's markers are not there once each and in order, or no section has any.
    """
    found = [name for name in sections if f"<!-- {name} -->" in text or f"<!-- /{name} -->" in text]
    if not found:
        starts = " or ".join(f"<!-- {name} -->" for name in sections)
        raise ValueError(f"{path} has no {starts}, expected one with its end around the figures")
    for name in found:
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, ended, after = rest.partition(end)
        if not ended or start in rest or start not in text or end in before + after:
            raise ValueError(f"{path} has not {start} once and {end} once after it, expected both around the figures")
        text = f"{before}{start}\n{sections[name].strip()}\n{end}{after}"
    return text


def drop_in_section(devices: Mapping[str, Sequence[Row]], command: str) -> str:
    """Write what ``mae_kernels.fuse`` does to other libraries' models.

    Args:
        devices: Rows by device.
        command: What made the section.
    """
    parts = []
    head = ["forward + backward", "before", "after", "ratio", "peak", "saved for backward", "error", "modules replaced"]
    for name, rows in devices.items():
        mine = [row for row in rows if row.suite == "drop-in"]
        if not mine:
            continue
        commands = ", ".join(dict.fromkeys(f"`{row.about.get('command', COMMAND)}`" for row in mine))
        parts.append(f"{name}, {commands}: {describe_about(mine)}.")
        lines = []
        for task in dict.fromkeys(row.task for row in mine):
            by_provider = _by_provider([row for row in mine if row.task == task])
            before, after = by_provider.get("original"), by_provider["fused"]
            if before is None:
                lines.append([task, "", after.wrong or after.absent or "", "", "", "", "", ""])
                continue
            sizes = [(before.peak_mib, after.peak_mib), (before.saved_mib, after.saved_mib)]
            pairs = [" to ".join(map(format_mib, pair)) for pair in sizes]
            errors = " to ".join("" if row.error is None else f"{row.error:.1e}" for row in (before, after))
            replaced = str(after.facts.get("modules replaced", ""))
            what = f"{task}, batch {after.shape['batch']}, {after.dtype}"
            lines.append([what, _time(before), _time(after), format_ratio(after), *pairs, errors, replaced])
        parts.append(markdown(head, lines, text_columns=1))
    parts.append(
        "Both take turns; the ratio is of times in the same round, median, 20th to 80th percentile. The error is that "
        f"of loss and gradients against float64, before and after. Written by `{command}`."
    )
    return "\n\n".join(part if part.startswith("|") else _filled(part) for part in parts)


def performance_section(devices: Mapping[str, Sequence[Row]], links: Mapping[str, str], cost: str, command: str) -> str:
    """Write the section.

    Args:
        devices: Rows by device.
        links: From the README to each device's page.
        cost: From the README to the page of costs.
        command: What made the section.
    """
    parts = [
        _filled(
            "Providers take turns; a ratio is of two times in the same round, and above 1 is faster. Times and ratios "
            "are medians, in brackets their 20th and 80th percentile. Ratios are over the baseline; over the compiled "
            "reference the quotient of medians is given, and named so. Everything that was measured, with plots: "
            f"{', '.join(f'[{name}]({link})' for name, link in links.items())}. "
            f"[What pre-training on AudioSet would cost]({cost}) follows from the training step."
        )
    ]
    for name, rows in devices.items():
        parts += [f"### {name}", *_device([row for row in rows if row.suite != "drop-in"])]
    parts.append(_filled(f"All figures of this section were written by `{command}`."))
    return "\n\n".join(parts)


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _device(rows: Sequence[Row]) -> list[str]:
    commands = list(dict.fromkeys(str(row.about.get("command", COMMAND)) for row in rows))
    parts = [_filled("; ".join(f"`{command}`" for command in commands) + f": {describe_about(rows)}.")]
    main = together(main_rows(rows))
    parts += _steps([row for row in main if row.suite == "steps"])
    parts += _operators([row for row in main if row.suite == "operators"])
    parts += _others([row for row in main if row.suite in ("fine-tuning", "inference", "front end", "loader")])
    parts += [
        f"{row.suite.capitalize()}, {describe_task(row)}: "
        + ", ".join(f"{name} {format_fact(name, value)}" for name, value in row.facts.items())
        + "."
        for row in main
        if row.suite == "training loop"
    ]
    return parts


def _time(row: Row | None) -> str:
    """A time, or why there is none; the page has the reason."""
    if row is None:
        return ""
    return "wrong" if row.wrong else "absent" if row.absent else format_time(row)


def _quotient(slow: Row | None, fast: Row | None) -> str:
    """Of medians."""
    both = slow is not None and fast is not None and slow.p50_ms and fast.p50_ms
    return f"{slow.p50_ms / fast.p50_ms:.2f}x" if both else ""  # type: ignore[union-attr, operator]


def _by_provider(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.provider: row for row in rows}


def _steps(rows: Sequence[Row]) -> list[str]:
    """The first model's step: the others are on the page."""
    mine = [row for row in rows if (row.task, row.shape, row.dtype) == (rows[0].task, rows[0].shape, rows[0].dtype)]
    if not mine:
        return []
    compiled = _by_provider(mine).get(COMPILED)
    head = [f"training step of {describe_task(mine[0])}, {mine[0].dtype}", "time", f"over {mine[0].baseline}"]
    head += [f"over {COMPILED} (quotient of medians)"] if compiled else []
    head += ["clips/s", "model FLOPs utilisation", "peak", "saved"]
    lines = []
    for row in mine:
        used = row.facts.get("model FLOPs utilisation")
        lines.append(
            [
                row.provider,
                _time(row),
                format_ratio(row),
                *([_quotient(compiled, row)] if compiled else []),
                format_number(row.facts["clips/s"]) if "clips/s" in row.facts else "",
                "" if used is None else format_share(used),
                format_mib(row.peak_mib),
                format_mib(row.saved_mib),
            ]
        )
    return [markdown(head, lines)]


def _operators(rows: Sequence[Row]) -> list[str]:
    """The lowest precision's largest batch: the others are on the page."""
    if not rows:
        return []
    dtype, batch = max(((row.dtype, row.shape.get("batch", 0)) for row in rows), key=_preference)
    mine = [row for row in rows if row.dtype == dtype and row.shape.get("batch", 0) == batch]
    tasks: dict[str, list[Row]] = {}
    for row in mine:
        own = {name: size for name, size in row.shape.items() if name != "batch"}
        tasks.setdefault(f"`{row.task}`, {describe_sizes(own)}" if own else f"`{row.task}`", []).append(row)
    threads = sizes_of(mine[0]).get("threads")
    where = f"batch {batch}, {dtype}" + (f", threads {threads}" if threads else "")
    head = [f"operator, forward + backward, {where}", REFERENCE, COMPILED, FUSED]
    head += [f"{FUSED} over {REFERENCE}", f"{FUSED} over {COMPILED} (quotient of medians)"]
    lines = []
    for task, same in tasks.items():
        by_provider = _by_provider(same)
        fused, compiled = by_provider.get(FUSED), by_provider.get(COMPILED)
        times = [_time(by_provider.get(provider)) for provider in (REFERENCE, COMPILED, FUSED)]
        lines.append([task, *times, format_ratio(fused) if fused else "", _quotient(compiled, fused)])
    return [markdown(head, lines)]


def _preference(case: tuple[str, int]) -> tuple[bool, int]:
    return case[0] != "float32", case[1]


def _others(rows: Sequence[Row]) -> list[str]:
    """What is compared with one baseline each."""
    lines = []
    for row in rows:
        if row.provider == row.baseline:
            continue
        theirs = [
            other
            for other in rows
            if other.provider == row.baseline
            and (other.suite, other.task, other.dtype) == (row.suite, row.task, row.dtype)
            and sizes_of(other) == sizes_of(row)
        ]
        clips = format_number(row.facts["clips/s"]) if "clips/s" in row.facts else ""
        what = f"{row.suite}: {describe_task(row)}, {row.dtype}"
        baseline = _time(theirs[0] if theirs else None)
        lines.append([what, row.provider, _time(row), clips, f"{row.baseline}: {baseline}", format_ratio(row)])
    head = ["others", "provider", "time", "clips/s", "baseline", "ratio"]
    return [markdown(head, lines)] if lines else []

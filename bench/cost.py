"""What pre-training on AudioSet would cost, from measured steps."""

from collections.abc import Iterable

from bench.rows import Row
from bench.tables import describe_sizes, device_of, format_number, format_time, is_gpu, markdown, sizes_of

CLIPS = 1_960_000 + 21_000
"""AudioSet's unbalanced and balanced clips."""
EPOCHS = 32
PAPER_DEVICES, PAPER_HOURS = 64, 36
"""V100s, and how long the paper pre-trained on them."""
PAPER_BATCH = 512
TASK = "ViT-B local"
SCALED_TO = (8, 64)
"""Devices for which linear scaling is assumed."""


def hours(batch: int, step_ms: float) -> float:
    """Hours of all epochs on one device, from the clips of a step and its milliseconds."""
    return CLIPS * EPOCHS / batch * step_ms / 1e3 / 3600


def cost_page(rows: Iterable[Row]) -> str:
    """Write the page.

    Args:
        rows: Of any devices and suites; the steps of ViT-B with the local decoder count.
    """
    rows = list(rows)
    steps = [row for row in rows if row.suite == "steps" and row.task == TASK]
    paper = PAPER_DEVICES * PAPER_HOURS
    parts = [
        "# What pre-training costs",
        f"AudioSet-2M has 1.96 M unbalanced and 21 K balanced clips: {CLIPS:,}, which {EPOCHS} epochs see "
        f"{CLIPS * EPOCHS / 1e6:.1f} M times. The paper pre-trained on them in {PAPER_HOURS} hours on {PAPER_DEVICES} "
        f"V100s: {paper:,} V100-hours.",
        "Below is what the measured training step of ViT-B with 16 local decoder blocks makes of that: forward, "
        "backward and optimiser, clips divided by clips a second. These hours are a projection, not a run.",
    ]
    if not any(is_gpu(row) for row in steps):
        parts.append("**No GPU is measured.** A processor's hours tell how the providers compare, and no more.")
    if steps:
        parts.append(_table(steps))
        parts.append(_assumptions(rows))
    else:
        parts.append("No training step is measured.")
    return "\n\n".join(parts) + "\n"


def _table(steps: list[Row]) -> str:
    head = ["device", "provider", "precision and sizes", "step", "clips/s", "hours on one (p20 to p80)"]
    head += [f"hours on {count}, if linear" for count in SCALED_TO]
    lines = []
    for row in steps:
        sizes = f"{row.dtype}, {describe_sizes(sizes_of(row))}"
        reason = f"wrong: {row.wrong}" if row.wrong else f"absent: {row.absent}" if row.absent else ""
        if reason or row.p50_ms is None:
            lines.append([device_of(row), row.provider, sizes, reason or "not timed", *[""] * (len(head) - 4)])
            continue
        batch = int(row.shape["batch"])
        one, low, high = (hours(batch, ms or row.p50_ms) for ms in (row.p50_ms, row.p20_ms, row.p80_ms))
        spread = f"{format_number(one)} ({format_number(low)} to {format_number(high)})"
        rate = format_number(1e3 * batch / row.p50_ms)
        scaled = [format_number(one / count) for count in SCALED_TO]
        lines.append([device_of(row), row.provider, sizes, format_time(row, spread=False), rate, spread, *scaled])
    paper = ["V100", "the paper", f"batch {PAPER_BATCH} on all", "", ""]
    lines.append([*paper, f"{PAPER_DEVICES * PAPER_HOURS:,} in all", "", f"{PAPER_HOURS}, as published"])
    return markdown(head, lines, text_columns=3)


def _assumptions(rows: list[Row]) -> str:
    lines = [
        "What the projection assumes:",
        "- The loader keeps up, and nothing else waits: the step is timed alone, on one batch that is on the device."
        + _loaders(rows),
        "- Several devices scale linearly. This is assumed, not measured: gradients must be exchanged, and the paper's "
        f"batch of {PAPER_BATCH} leaves {PAPER_BATCH // max(SCALED_TO)} clips for each of {max(SCALED_TO)} devices, "
        "fewer than a fast device needs to be busy.",
        "- An epoch sees every clip of the data set once. Evaluation, checkpoints and the device's start are left out.",
    ]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _loaders(rows: list[Row]) -> str:
    """What was measured of loaders, of which the baseline is not ours."""
    measured = [
        f"{row.task} {format_number(row.facts['clips/s'])} ({describe_sizes(sizes_of(row)) or device_of(row)})"
        for row in rows
        if row.suite == "loader" and "clips/s" in row.facts and row.provider != row.baseline
    ]
    return f" Measured of the loader, clips/s: {'; '.join(measured)}." if measured else " The loader is not measured."

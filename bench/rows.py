"""A row of results: what was measured, on what, against what; and the files that hold rows."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One provider's way to do one thing, in one mode.

    Attributes:
        suite: ``"operators"``, ``"steps"``, ``"fine-tuning"``, ``"inference"``, ``"front end"``, ``"loader"``,
            ``"training loop"`` or ``"ceilings"``.
        task: What is done: an operator's name, or the model, as ``"ViT-B local"``.
        provider: Who does it, as ``"fused"``.
        baseline: The provider that ratios are over.
        mode: ``"forward"`` (as training runs it), ``"backward"``, ``"both"``; ``"all"`` where there is one only.
        shape: Sizes by name, as ``{"batch": 8, "tokens": 103}``.
        dtype: ``"float32"``, ``"bfloat16"``: of autocast, or of everything.
        varies: The size that a series of rows grows in; None elsewhere.
        p20_ms: Of the times in milliseconds, as are ``p50_ms`` and ``p80_ms``. None where nothing was timed.
        ratio: Median over pairs of the baseline's time to this provider's: above 1 is faster than the baseline.
        ratio_p20: The ratios' 20th percentile, and ``ratio_p80`` their 80th.
        rounds: Pairs.
        least_bytes: That must be read and written.
        least_flops: Of its matrix products.
        gb_per_s: Least bytes over the median time.
        tflop_per_s: Least FLOPs over the median time.
        ceiling_share: The time that the rates of the same run's copy and matrix product allow, over the median time.
        bound: Which of the two allows less: ``"memory"`` or ``"compute"``.
        peak_mib: Highest memory allocated above what was there before the call, MiB.
        saved_mib: Kept for backward, MiB.
        error: Largest distance from float64 of an output or a gradient over its largest value; of a step, of the loss
            and of all gradients as one vector, over its norm.
        compile_s: What the first call cost above a later one, for compiled providers, seconds.
        wrong: Why the provider is out of tolerance; it then has no times.
        absent: Why the provider is not here; it then has nothing else.
        facts: What else belongs to the suite, as ``{"clips/s": 12.0}``.
        about: Where and with what: see :func:`bench.provenance.provenance`.
    """

    suite: str
    task: str
    provider: str
    baseline: str
    mode: str = "all"
    shape: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    varies: str | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    rounds: int | None = None
    least_bytes: int | None = None
    least_flops: int | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    ceiling_share: float | None = None
    bound: str | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    error: float | None = None
    compile_s: float | None = None
    wrong: str | None = None
    absent: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a JSON array, one a line, without what they lack."""
    lines = [
        json.dumps({name: _rounded(value) for name, value in asdict(row).items() if value is not None and value != {}})
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def _rounded(value: Any) -> Any:
    """Five significant digits: more than a time repeats."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Read the rows of files.

    Raises:
        ValueError: A file that does not hold rows.
    """
    rows = []
    for path in paths:
        try:
            rows += [Row(**record) for record in json.loads(path.read_text())]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no rows of results, as pytest bench/ writes them: {error}") from None
    return rows

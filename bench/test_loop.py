"""The training loop as a user runs it, the demo in a process of its own: how much of the time does it wait for data?"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from audiomae.recipes import demo
from audiomae.training.command import share_processors
from audiomae.training.config import autocast_dtype
from audiomae.training.distributed import join_ranks
from bench.compare import Plan
from bench.precision import name_of
from bench.provenance import provenance
from bench.rows import Row
from bench.turns import spread

FLAGS = {"fused": ["--fused"], "reference": []}
EPOCHS = 2


def summarise(records: Sequence[dict[str, Any]], batch: int) -> tuple[list[float], dict[str, float]]:
    """Summarise a log after its first record, which has the start of the workers and the first steps in it.

    Args:
        records: Of ``log.jsonl``.
        batch: Clips of a step.

    Returns:
        Milliseconds of a step between logged ones, and the facts of a row, over all of the time.
    """
    clips = [(after["step"] - before["step"]) * batch for before, after in pairwise(records)]
    seconds = [count / after["clips_per_second"] for count, after in zip(clips, records[1:], strict=True)]
    waited = sum(after["waiting"] * duration for duration, after in zip(seconds, records[1:], strict=True))
    steps_ms = [1e3 * batch * duration / count for duration, count in zip(seconds, clips, strict=True)]
    return steps_ms, {"clips/s": sum(clips) / sum(seconds), "waiting for data": waited / sum(seconds)}


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("provider", ["fused", pytest.param("reference", marks=pytest.mark.full)])
def test_demo(plan: Plan, rows: list[Row], tmp_path: Path, provider: str) -> None:
    config = demo()
    with join_ranks(config.device) as ranks:
        workers = share_processors(None, ranks)  # as the run does, so that provenance has its threads
    epochs = 1 if plan.short else EPOCHS
    command = [sys.executable, "-m", "audiomae.pretrain", "--output-dir", str(tmp_path / "run"), *FLAGS[provider]]
    command += ["--epochs", str(epochs), "--warmup-epochs", "0", "--picture-every", "0"]

    def run() -> None:
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    assert plan.pedantic
    plan.pedantic(run, rounds=1, iterations=1)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps_ms, facts = summarise(records, config.batch_size)
    low, middle, high = spread(steps_ms)
    rows.append(
        Row(
            "training loop",
            "demo",
            provider,
            "reference",
            shape={"batch": config.batch_size, "workers": workers},
            dtype=name_of(autocast_dtype(config.precision, ranks.device)),
            p20_ms=low,
            p50_ms=middle,
            p80_ms=high,
            rounds=len(steps_ms),
            facts=facts,
            about=provenance(ranks.device),
        )
    )

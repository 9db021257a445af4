"""The fine-tuning step of ViT-B with the paper's masking, against the same step on all patches."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import saved_tensor_bytes
from bench.pairs import time_pairs
from bench.provenance import provenance
from bench.step import build_finetuning_step

GIB = 2**30
ROUNDS = 5
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("device", "batch", "dtype"),
    [("cpu", 2, torch.float32), pytest.param("cuda", 64, torch.bfloat16, marks=NEEDS_GPU)],
)
def test_finetuning_step(benchmark: BenchmarkFixture, device: str, batch: int, dtype: torch.dtype) -> None:
    steps, facts = {}, {}
    for provider, masked in {"masked": True, "all patches": False}.items():
        model, forward, run = build_finetuning_step("auto", torch.device(device), batch, dtype, masked=masked)
        facts[f"{provider} saved GiB"] = round(saved_tensor_bytes(forward, model) / GIB, 3)

        def step(run: Callable[[], None] = run) -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        steps[provider] = step

    benchmark.group = f"ViT-B, fine-tuning step, batch {batch}, {dtype}, {device}"
    pairs = time_pairs(benchmark, steps["masked"], steps["all patches"], rounds=ROUNDS)
    benchmark.extra_info.update(
        {
            "operator": "fine-tuning step",
            "provider": "masked 0.3 / 0.3",
            "baseline": "all patches",
            "shape": [batch, 1, 1024, 128],
            "dtype": str(dtype),
            **facts,
            **pairs,
            **provenance(torch.device(device)),
        }
    )

"""The pre-training step of ViT-B with the local decoder, fused against the reference: time, memory, saved bytes."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import peak_memory_bytes, saved_tensor_bytes
from bench.pairs import time_pairs
from bench.provenance import provenance
from bench.step import build_step

GIB = 2**30
ROUNDS = 10
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("device", "batch", "dtype"),
    [("cpu", 8, torch.float32), pytest.param("cuda", 64, torch.bfloat16, marks=NEEDS_GPU)],
)
def test_pretraining_step(benchmark: BenchmarkFixture, device: str, batch: int, dtype: torch.dtype) -> None:
    steps, facts = {}, {}
    for provider, impl in {"reference": "reference", "fused": "auto"}.items():
        model, forward, run = build_step(impl, torch.device(device), batch, dtype)
        facts[f"{provider} saved GiB"] = round(saved_tensor_bytes(forward, model) / GIB, 3)

        def step(run: Callable[[], None] = run) -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        step()  # makes the optimiser's state, which the peak includes
        if device == "cuda":  # of a process, it would count what the other provider has left
            facts[f"{provider} peak GiB"] = round(peak_memory_bytes(step, torch.device(device)) / GIB, 3)
        steps[provider] = step

    benchmark.group = f"ViT-B local, training step, batch {batch}, {dtype}, {device}"
    pairs = time_pairs(benchmark, steps["fused"], steps["reference"], rounds=ROUNDS)
    benchmark.extra_info.update(
        {
            "operator": "pre-training step",
            "provider": "fused",
            "baseline": "reference",
            "shape": [batch, 1, 1024, 128],
            "dtype": str(dtype),
            **facts,
            "saved ratio": round(facts["fused saved GiB"] / facts["reference saved GiB"], 3),
            "clips/s": round(batch / benchmark.stats.stats.median, 3),
            **pairs,
            **provenance(torch.device(device)),
        }
    )

"""The pre-training step of ViT-B with the local decoder, fused against the reference: time, memory, saved bytes."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from audiomae import AudioMAE, AudioMAEConfig, PatchMask
from audiomae.training.optimizer import build_adamw
from bench.measure import peak_memory_bytes, saved_tensor_bytes
from bench.pairs import time_pairs
from bench.provenance import provenance

GIB = 2**30
ROUNDS = 10
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def build_step(
    impl: str, device: str, batch: int, dtype: torch.dtype
) -> tuple[AudioMAE, Callable[[], Tensor], Callable[[], None]]:
    """The model, its forward on a fixed batch, and a whole training step, which waits for the device."""
    torch.manual_seed(0)
    model = AudioMAE(AudioMAEConfig(), impl=impl).to(device)
    optimizer = build_adamw(model, lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.95))
    spec = torch.randn(batch, 1, *model.config.spec_size, device=device)
    mask = PatchMask.random(torch.arange(batch, device=device), model.grid, ratio=0.8, impl=impl)

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(spec, mask).loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return model, forward, step


@pytest.mark.parametrize(
    ("device", "batch", "dtype"),
    [("cpu", 8, torch.float32), pytest.param("cuda", 64, torch.bfloat16, marks=NEEDS_GPU)],
)
def test_pretraining_step(benchmark: BenchmarkFixture, device: str, batch: int, dtype: torch.dtype) -> None:
    steps, facts = {}, {}
    for provider, impl in {"reference": "reference", "fused": "auto"}.items():
        model, forward, step = build_step(impl, device, batch, dtype)
        facts[f"{provider} saved GiB"] = round(saved_tensor_bytes(forward, model) / GIB, 3)
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

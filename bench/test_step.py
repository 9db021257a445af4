"""The pre-training step of ViT-B with the local decoder: time, peak memory, bytes saved for backward."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from audiomae import AudioMAE, AudioMAEConfig, PatchMask
from audiomae.training.optimizer import build_adamw
from bench.measure import peak_memory_bytes, saved_tensor_bytes
from bench.provenance import provenance

GIB = 2**30
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("impl", ["reference"])
@pytest.mark.parametrize(
    ("device", "batch", "dtype"),
    [("cpu", 8, torch.float32), pytest.param("cuda", 64, torch.bfloat16, marks=NEEDS_GPU)],
)
def test_pretraining_step(benchmark: BenchmarkFixture, device: str, batch: int, dtype: torch.dtype, impl: str) -> None:
    torch.manual_seed(0)
    model = AudioMAE(AudioMAEConfig(), impl=impl).to(device)
    optimizer = build_adamw(model, lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.95))
    spec = torch.randn(batch, 1, *model.config.spec_size, device=device)
    mask = PatchMask.random(torch.arange(batch, device=device), model.grid, ratio=0.8, impl=impl)

    def forward() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(spec, mask).loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    saved = saved_tensor_bytes(forward, model)
    step()  # makes the optimiser's state, which the peak includes
    peak = peak_memory_bytes(step, torch.device(device))
    benchmark.group = f"ViT-B local, training step, batch {batch}, {dtype}, {device}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        {
            "operator": "pre-training step",
            "provider": impl,
            "shape": list(spec.shape),
            "dtype": str(dtype),
            "saved GiB": round(saved / GIB, 3),
            "peak GiB": round(peak / GIB, 3),
            "clips/s": round(batch / benchmark.stats.stats.median, 3),
            **provenance(torch.device(device)),
        }
    )

"""The pre-training step of ViT-B with the local decoder: time, peak memory, bytes saved for backward."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from audiomae import AudioMAE, AudioMAEConfig, PatchMask
from audiomae.training.optimizer import build_adamw
from bench.measure import peak_memory_bytes, saved_tensor_bytes

GIB = 2**30


@pytest.mark.parametrize("impl", ["reference"])
def test_pretraining_step(benchmark: BenchmarkFixture, impl: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, dtype = (64, torch.bfloat16) if device.type == "cuda" else (8, torch.float32)
    torch.manual_seed(0)
    model = AudioMAE(AudioMAEConfig(), impl=impl).to(device)
    optimizer = build_adamw(model, lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.95))
    spec = torch.randn(batch, 1, *model.config.spec_size, device=device)
    mask = PatchMask.random(torch.arange(batch, device=device), model.grid, ratio=0.8)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(spec, mask).loss

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    saved = saved_tensor_bytes(forward, model)
    step()  # creates the optimiser's state, which the peak includes
    peak = peak_memory_bytes(step, device)
    benchmark.group = f"ViT-B local step, batch {batch}, {dtype}, {device.type}"
    benchmark.pedantic(step, rounds=3, warmup_rounds=0)
    benchmark.extra_info.update(
        {
            "saved tensors GiB": round(saved / GIB, 3),
            "peak memory GiB": round(peak / GIB, 3),
            "clips/s": round(batch / benchmark.stats.stats.median, 3),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    )

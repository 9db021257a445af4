"""Whole steps: pre-training, fine-tuning, inference."""

import pytest
import torch

from bench.compare import Plan, wrong
from bench.inference_suite import measure_inference
from bench.measure import ceiling_rows
from bench.provenance import provenance
from bench.rows import Row
from bench.step_suite import CONFIGS, measure_finetuning_step, measure_pretraining_step

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def cases(cpu_batch: int, gpu_batch: int) -> list[object]:
    return [
        ("cpu", cpu_batch, torch.float32),
        pytest.param("cuda", gpu_batch, torch.bfloat16, marks=NEEDS_GPU),
    ]


@pytest.mark.parametrize(("device", "batch", "dtype"), cases(2, 64))
@pytest.mark.parametrize(
    "task", [task if task == "ViT-B local" else pytest.param(task, marks=pytest.mark.full) for task in CONFIGS]
)
def test_pretraining_step(plan: Plan, rows: list[Row], task: str, device: str, batch: int, dtype: torch.dtype) -> None:
    where = torch.device(device)
    compiled = plan.full or device == "cuda"  # a minute for each form on a CPU
    measured = measure_pretraining_step(plan, where, batch, dtype, task=task, compiled=compiled)
    rows += ceiling_rows(where, dtype, provenance(where)) + measured
    assert not wrong(measured)


@pytest.mark.parametrize(("device", "batch", "dtype"), cases(1, 64))
def test_finetuning_step(plan: Plan, rows: list[Row], device: str, batch: int, dtype: torch.dtype) -> None:
    measured = measure_finetuning_step(plan, torch.device(device), batch, dtype)
    rows += measured
    assert not wrong(measured)


@pytest.mark.parametrize(("device", "batch", "dtype"), cases(1, 64))
def test_inference(plan: Plan, rows: list[Row], device: str, batch: int, dtype: torch.dtype) -> None:
    measured = measure_inference(plan, torch.device(device), batch, dtype)
    rows += measured
    assert not wrong(measured)

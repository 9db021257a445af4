"""Other libraries' models before and after ``mae_kernels.fuse``; minutes on a CPU, so with ``--full``."""

import pytest
import torch

from bench.compare import Plan, wrong
from bench.drop_in_suite import MODELS, measure_drop_in
from bench.rows import Row

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.full
@pytest.mark.parametrize(
    ("device", "batch", "dtype"),
    [("cpu", 2, torch.float32), pytest.param("cuda", 64, torch.bfloat16, marks=NEEDS_GPU)],
)
@pytest.mark.parametrize("task", MODELS)
def test_drop_in(plan: Plan, rows: list[Row], task: str, device: str, batch: int, dtype: torch.dtype) -> None:
    measured = measure_drop_in(plan, task, torch.device(device), batch, dtype)
    rows += measured
    assert not wrong(measured)

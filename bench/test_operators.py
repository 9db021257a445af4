"""Every operator at the sizes of ViT-B, fused against the reference, forward and backward, in pairs that take turns."""

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.operators import WORKLOADS, Workload, Workloads
from bench.pairs import time_pairs
from bench.provenance import provenance

ROUNDS = 15
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a CPU one thread: with more, a machine that does anything else is measured, not the operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def forward_and_backward(workload: Workload, impl: str, dtype: torch.dtype) -> Callable[[], None]:
    device = next(iter(workload.tensors.values())).device
    upstream: list[Tensor] = []

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            outputs = workload(impl)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        trained = [output for output in outputs if output.requires_grad]
        if trained:
            if not upstream:
                upstream.extend(torch.randn_like(output) for output in trained)
            torch.autograd.grad(trained, workload.inputs, upstream)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize(
    ("device", "batch", "dtype"),
    [("cpu", 8, torch.float32), pytest.param("cuda", 512, torch.bfloat16, marks=NEEDS_GPU)],
)
@pytest.mark.parametrize("operator", WORKLOADS)
def test_operator(benchmark: BenchmarkFixture, operator: str, device: str, batch: int, dtype: torch.dtype) -> None:
    workload = WORKLOADS[operator](Workloads(batch, device, dtype))
    fused, reference = (forward_and_backward(workload, impl, dtype) for impl in ("auto", "reference"))
    benchmark.group = f"operators, forward + backward, batch {batch}, {dtype}, {device}"
    pairs = time_pairs(benchmark, fused, reference, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info.update(
        {
            "operator": operator,
            "provider": "fused",
            "baseline": "reference",
            "dtype": str(dtype),
            **pairs,
            **provenance(torch.device(device)),
        }
    )

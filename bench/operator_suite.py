"""An operator by every provider: right or wrong first, then time, memory and how near the device's ceilings."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bench.accuracy import attempt, judge_workload, results
from bench.compare import Plan, compare, is_compiled
from bench.measure import MIB, measure_ceilings, peak_bytes, saved_tensor_bytes
from bench.operators import WORKLOADS, Workloads
from bench.precision import autocast, name_of
from bench.provenance import provenance
from bench.providers import find_providers
from bench.rows import Row
from bench.turns import Call, Laps, Mark, unmarked
from bench.workload import VIT_B, Floor, Form, Sizes, Workload

BEYOND_CACHE = 256 * MIB
"""Inputs rotate through about so many bytes, more than a last-level cache holds."""


def caller(form: Form, workloads: Sequence[Workload], dtype: torch.dtype) -> Call:
    """Make a call that runs forward and, where something is trained, backward, on the inputs of its turn."""
    device = next(iter(workloads[0].tensors.values())).device
    upstream: dict[tuple[torch.dtype, torch.Size], Tensor] = {}

    def call(turn: int, mark: Mark) -> None:
        workload = workloads[turn % len(workloads)]
        with autocast(device, dtype):
            outputs = form(workload.tensors)
        mark("forward")
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        trained = [output for output in outputs if output.requires_grad]
        if trained:
            for output in trained:
                key = output.dtype, output.shape
                if key not in upstream:
                    upstream[key] = torch.randn_like(output)
            gradients = [upstream[output.dtype, output.shape] for output in trained]
            torch.autograd.grad(trained, workload.inputs, gradients)
            mark("backward")

    return call


def measure_operator(
    plan: Plan,
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    *,
    sizes: Sizes = VIT_B,
    varies: str | None = None,
    providers: Sequence[str] | None = None,
    compiled: bool = True,
    fused_red: str | None = None,
    budget_s: float = 3,
) -> list[Row]:
    """Measure an operator.

    Args:
        plan: How much is measured.
        operator: A name in :data:`bench.operators.WORKLOADS`.
        device: Where.
        dtype: Of autocast, float32 for none.
        batch: Clips.
        sizes: Of the model.
        varies: What the rows are told by, if they are of a series.
        providers: Which providers, all by default; the reference always.
        compiled: Also those under torch.compile.
        fused_red: A test of the fused form that failed: then it is wrong, and not timed.
        budget_s: About how long to time, in seconds.

    Returns:
        A row for each provider and mode, or one that says why it is wrong or absent.
    """
    first = WORKLOADS[operator](Workloads(batch, device.type, dtype, sizes))
    copies = 1 + min(BEYOND_CACHE // max(first.nbytes, 1), 15)
    workloads = [first] + [
        WORKLOADS[operator](Workloads(batch, device.type, dtype, sizes, seed)) for seed in range(1, copies)
    ]
    about = Row(
        "operators",
        operator,
        "fused",
        "reference",
        shape=first.shape,
        dtype=name_of(dtype),
        varies=varies,
        about=provenance(device),
    )
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    fields: dict[str, dict[str, float]] = {}
    judge = judge_workload(first, dtype)
    modes = plan.compiler_modes(device) if compiled else {}
    for provider, form in find_providers(first, device, dtype, modes).items():
        if providers is not None and provider not in (*providers, "reference"):
            continue
        if isinstance(form, str):
            rows.append(replace(about, provider=provider, absent=form))
            continue
        start = time.perf_counter()
        red = fused_red if provider.startswith("fused") else None
        wrong = red or attempt(lambda form=form: judge.find_error(results(first, form, dtype)))
        first_s = time.perf_counter() - start
        if wrong:
            rows.append(replace(about, provider=provider, wrong=wrong))
            continue
        calls[provider] = caller(form, workloads, dtype)
        fields[provider] = measure_memory(form, calls[provider], first, device, dtype)
        fields[provider]["error"] = judge.error
        if is_compiled(provider):
            fields[provider]["compile_s"] = first_s
    parts = ("forward", "backward", "all") if first.inputs else ("all",)
    laps = Laps(device, kernels=True)
    timed = compare(plan, about, calls, laps, fields=fields, modes=parts, budget_s=budget_s)
    for row in timed:
        add_floor(row, first, measure_ceilings(device, dtype))
    return rows + timed


def measure_memory(
    form: Form, call: Call, workload: Workload, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Measure peak and saved bytes of a provider that has run before."""

    def forward() -> object:
        with autocast(device, dtype):
            return form(workload.tensors)

    return {
        "peak_mib": peak_bytes(lambda: call(0, unmarked), device) / MIB,
        "saved_mib": saved_tensor_bytes(forward, workload.tensors.values()) / MIB,
    }


def add_floor(row: Row, workload: Workload, ceilings: tuple[float, float]) -> None:
    """Say how near a row is to what the device reaches.

    Args:
        row: Gets the least bytes and FLOPs of its mode, and what follows from them.
        workload: What was computed.
        ceilings: Bytes and FLOPs a second of the device.
    """
    floors = {"forward": [workload.forward], "backward": [workload.backward]}
    floors["both"] = floors["all"] = [workload.forward, workload.backward]
    parts: list[Floor] = [floor for floor in floors[row.mode] if floor]
    seconds = (row.p50_ms or 0) / 1e3
    memory, compute = (
        [getattr(part, what) / rate for part in parts]
        for what, rate in zip(("read_and_written", "flops"), ceilings, strict=True)
    )
    row.least_bytes = sum(part.read_and_written for part in parts)
    row.least_flops = sum(part.flops for part in parts)
    row.gb_per_s, row.tflop_per_s = row.least_bytes / seconds / 1e9, row.least_flops / seconds / 1e12
    row.ceiling_share = sum(map(max, memory, compute)) / seconds
    row.bound = "memory" if sum(memory) > sum(compute) else "compute"

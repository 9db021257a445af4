"""The stages of ``bench.gpu``: each measures something and adds it to the report."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from audiomae import AudioMAEConfig
from bench.accuracy import find_errors
from bench.gpu_report import Report
from bench.measure import peak_memory_bytes, time_quantiles
from bench.operators import WORKLOADS, Floor, Workload, Workloads
from bench.step import build_step

ROOT = Path(__file__).resolve().parents[1]
MIB, GIB = 2**20, 2**30
RESULT = re.compile(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)


def measure_ceilings(report: Report, device: torch.device) -> None:
    """Measure what the device reaches: copying 1 GiB, and a square product in each precision."""
    source = torch.empty(GIB // 4, device=device)
    target = torch.empty_like(source)
    median = time_quantiles(lambda: target.copy_(source), device)[1]
    report.ceilings["copy GB/s"] = 2 * source.nbytes / median / 1e6
    side = 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        median = time_quantiles(lambda a=a, b=b: a @ b, device)[1]
        report.ceilings[f"{name_of(dtype)} TFLOP/s"] = 2 * side**3 / median / 1e9


def run_tests(report: Report, *, limit_s: float) -> None:
    """Run the operators' tests, a process for each file; one that ``limit_s`` cuts short counts as far as it came."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        running: dict[Path, subprocess.Popen[bytes]] = {}
        for file in sorted((ROOT / "tests/kernels").glob("test_*.py")):
            log = Path(folder) / f"{file.stem}.log"
            command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", str(file)]
            with log.open("wb") as output:
                running[log] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
        deadline = time.monotonic() + limit_s
        for log, process in running.items():
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                report.skip(f"the rest of {log.stem}", f"its tests ran over {limit_s:.0f} s")
            text = log.read_text(errors="replace")
            results = RESULT.findall(text)
            counts.update(outcome.lower() for _, outcome in results)
            red = [test for test, outcome in results if outcome in ("FAILED", "ERROR")]
            report.red += red
            if red or (not results and process.returncode != 0):
                report.fail(f"tests of {log.stem}", text[-6000:])
    report.tests = dict(counts)


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def measure_operator(report: Report, operator: str, device: torch.device, dtype: torch.dtype, batch: int) -> None:
    """Check an operator, then time it eager, compiled and fused, forward and with backward."""
    row = {"operator": operator, "dtype": name_of(dtype), "batch": batch}
    red = report.red_tests(operator) + find_errors(operator, "auto", device.type, dtype)
    if red:
        report.operators.append(row | {"error": red[0]})
        report.red += [line for line in red if line not in report.red]
        return
    workload = WORKLOADS[operator](Workloads(batch, device.type, dtype))
    torch.compiler.reset()
    compiled = torch.compile(workload.__call__)
    providers: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
        "eager": lambda: workload("reference"),
        "compiled": lambda: compiled("reference"),
        "fused": lambda: workload("auto"),
    }
    modes = ["forward"] if workload.backward is None else ["forward", "forward + backward"]
    for mode in modes:
        times: dict[str, float] = {}
        facts = dict(row, mode=mode)
        for provider, call in providers.items():
            step = forward_only(call, device, dtype) if mode == "forward" else with_backward(call, device, dtype)
            step()
            clear(workload)
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            peak = peak_memory_bytes(step, device) - before
            p20, times[provider], p80 = time_quantiles(step, device, clear=workload.inputs)
            facts |= {provider: times[provider], f"{provider} MiB": peak / MIB}
            facts |= {f"{provider} p20": p20, f"{provider} p80": p80}
        facts["over eager"] = times["eager"] / times["fused"]
        facts["over compiled"] = times["compiled"] / times["fused"]
        floors = [workload.forward] if mode == "forward" else [workload.forward, workload.backward]
        facts["floor"] = floor_ms(report, [floor for floor in floors if floor], dtype) / times["fused"]
        report.operators.append(facts)


def floor_ms(report: Report, floors: list[Floor], dtype: torch.dtype) -> float:
    """Milliseconds that the measured ceilings allow: for each pass the larger of its traffic and its products."""
    bytes_per_ms = report.ceilings["copy GB/s"] * 1e6
    flops_per_ms = report.ceilings[f"{name_of(dtype)} TFLOP/s"] * 1e9
    return sum(max(floor.read_and_written / bytes_per_ms, floor.flops / flops_per_ms) for floor in floors)


def forward_only(call: Callable[[], object], device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A call in the precision, without gradients."""

    def run() -> object:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return call()

    return run


def with_backward(
    call: Callable[[], Tensor | tuple[Tensor, ...]], device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """A call in the precision and its backward, for the same random upstream gradients every time."""
    upstream: list[Tensor] = []

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = call()
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        if [gradient.dtype for gradient in upstream] != [output.dtype for output in outputs]:
            upstream[:] = [torch.randn_like(output) for output in outputs]
        torch.autograd.backward(outputs, upstream)

    return run


def clear(workload: Workload) -> None:
    """Drop the gradients of a workload's inputs."""
    for tensor in workload.inputs:
        tensor.grad = None


def measure_step(
    report: Report,
    device: torch.device,
    impl: str,
    *,
    compiled: bool,
    batch: int,
    config: AudioMAEConfig | None = None,
) -> None:
    """Time the training step of ViT-B and its memory above parameters, gradients and the optimiser's state."""
    torch.compiler.reset()
    model, _, step = build_step(impl, device, batch, torch.bfloat16, compiled=compiled, config=config)
    for _ in range(3):
        step()
    peak = peak_memory_bytes(step, device)
    p20, p50, p80 = time_quantiles(step, device, budget_ms=3000)
    state = 4 * sum(parameter.nbytes for parameter in model.parameters())  # itself, its gradient, two moments
    report.steps.append(
        {
            "impl": "fused" if impl == "auto" else impl,
            "compiled": compiled,
            "batch": batch,
            "ms": p50,
            "p20": p20,
            "p80": p80,
            "clips/s": 1e3 * batch / p50,
            "peak GiB": peak / GIB,
            "above state GiB": (peak - state) / GIB,
        }
    )


def profile_step(report: Report, device: torch.device, batch: int, config: AudioMAEConfig | None = None) -> None:
    """Find what the fused step spends its time on."""
    step = build_step("auto", device, batch, torch.bfloat16, config=config).run
    for _ in range(3):
        step()
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA, activity.CPU] if device.type == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    report.profile = profile.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)

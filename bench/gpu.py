"""Everything that a machine with a GPU can tell, in one command of at most eight minutes.

    python -m bench.gpu --out DIR           # tests, every operator, the ViT-B training step, a profile
    python -m bench.gpu --out DIR --full    # also float32, more sizes, autotuning, other libraries' models; takes long

Needs torch, triton, timm, pytest, pytest-benchmark and this source on the path (``PYTHONPATH=.:kernels``), nothing
installed. It measures as ``pytest bench/`` does, but for the tests, the deadline and the profile. An operator is timed
only where it is right: within twice the error of its reference, and with no red test. Writes ``rows.json``, for
``python -m bench.report``, and ``results.md`` under DIR as it goes, and prints the latter at the end.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from bench.compare import Plan
from bench.drop_in_suite import MODELS, measure_drop_in
from bench.gpu_report import Report
from bench.gpu_stages import profile_step, run_tests
from bench.inference_suite import measure_inference
from bench.measure import ceiling_rows
from bench.operator_suite import measure_operator
from bench.operators import WORKLOADS
from bench.provenance import provenance
from bench.rows import Row
from bench.step_suite import CONFIGS, measure_finetuning_step, measure_pretraining_step

LIMIT_S = 8 * 60
STEP_S, STEP_COMPILE_S = 30, 150
"""What measuring a training step may take, and with both forms compiled: with less left, it is left out and the report
says so."""


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m bench.gpu", description="Test and measure on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and results.md")
    parser.add_argument("--full", action="store_true", help="float32 and more batch sizes too, without a time limit")
    parser.add_argument("--batch", type=int, default=512, help="clips of an operator's call")
    parser.add_argument("--step-batch", type=int, default=128, help="clips of a training step")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave the test suite out")
    parser.add_argument("--operators", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: no GPU here, expected a CUDA or ROCm device")
    options.out.mkdir(parents=True, exist_ok=True)
    report = measure(options)
    print(report.text())
    sys.exit(1 if report.wrong else 0)


def measure(options: argparse.Namespace) -> Report:
    """Run all stages, each of which adds to the report; what raises is reported and ends its own stage only."""
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report(options.out, provenance(device))
    deadline = time.monotonic() + (float("inf") if options.full else LIMIT_S)

    def stage(name: str, call: Callable[[], None], needs_s: float = 5) -> None:
        left = deadline - time.monotonic()
        if left < needs_s:
            report.skip(name, f"{left:.0f} s were left, it needs {needs_s:.0f}")
        else:
            start = time.monotonic()
            print(f"{name} ...", flush=True)
            try:
                call()
            except Exception as error:  # one stage must not cost the others their results
                report.fail(name, "".join(traceback.format_exception(error)))
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        report.write()

    def measured(name: str, call: Callable[[], list[Row]], needs_s: float = 5) -> None:
        stage(name, lambda: report.rows.extend(call()), needs_s)

    plan = Plan(full=options.full)
    precisions = [torch.bfloat16, torch.float32] if options.full else [torch.bfloat16]
    for dtype in precisions:
        measured(f"ceilings, {dtype}", lambda d=dtype: ceiling_rows(device, d, report.about))
    if options.tests:
        stage("tests", lambda: run_tests(report, limit_s=1800 if options.full else 150))

    def operator(name: str, dtype: torch.dtype, batch: int) -> None:
        red = next(iter(report.red_tests(name)), None)
        measured(
            f"{name}, {dtype}, batch {batch}",
            lambda: measure_operator(plan, name, device, dtype, batch, fused_red=red, budget_s=1),
        )

    for dtype in precisions:
        for name in options.operators:
            operator(name, dtype, options.batch)
    batch = options.step_batch
    for task in CONFIGS if options.full else list(CONFIGS)[:1]:
        measured(
            f"training step of {task}",
            lambda t=task: measure_pretraining_step(plan, device, batch, torch.bfloat16, task=t, budget_s=12),
            needs_s=STEP_COMPILE_S,
        )
    stage("profile", lambda: profile_step(report, device, batch), needs_s=15)
    measured("fine-tuning step", lambda: measure_finetuning_step(plan, device, 64, torch.bfloat16, budget_s=6), STEP_S)
    measured("inference", lambda: measure_inference(plan, device, 64, torch.bfloat16, budget_s=3), STEP_S)
    if options.full:
        for task in MODELS:
            measured(f"drop-in, {task}", lambda t=task: measure_drop_in(plan, t, device, 64, torch.bfloat16))
        for batch in (8, 64, 256):
            for name in options.operators:
                operator(name, torch.bfloat16, batch)
    return report


if __name__ == "__main__":
    main()

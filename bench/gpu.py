"""Everything that a machine with a GPU can tell, in one command of at most eight minutes.

    python -m bench.gpu --out DIR           # tests, every operator, the ViT-B training step, a profile
    python -m bench.gpu --out DIR --full    # also float32, more batch sizes; takes as long as it takes

Needs torch, triton, timm, pytest and this source on the path (``PYTHONPATH=.:kernels``), nothing installed. An
operator is timed only where it is right: within twice the error of its reference, and with no red test. Writes
``results.json`` and ``results.md`` under DIR as it goes, and prints the latter at the end.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu_report import Report
from bench.gpu_stages import (
    measure_ceilings,
    measure_operator,
    measure_step,
    profile_step,
    run_tests,
)
from bench.operators import WORKLOADS
from bench.provenance import provenance

LIMIT_S = 8 * 60
STEP_COMPILE_S = 75
"""What compiling a training step may take: with less left, it is left out and the report says so."""


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
    sys.exit(1 if report.red or report.failures else 0)


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

    stage("ceilings", lambda: measure_ceilings(report, device))
    if options.tests:
        stage("tests", lambda: run_tests(report, limit_s=1800 if options.full else 150))
    precisions = [torch.bfloat16, torch.float32] if options.full else [torch.bfloat16]
    for dtype in precisions:
        for operator in options.operators:
            stage(
                f"{operator}, {dtype}",
                lambda o=operator, d=dtype: measure_operator(report, o, device, d, options.batch),
            )
    for compiled in (False, True):
        for impl in ("reference", "auto"):
            stage(
                f"training step, {impl}{', compiled' if compiled else ''}",
                lambda i=impl, c=compiled: measure_step(report, device, i, compiled=c, batch=options.step_batch),
                needs_s=STEP_COMPILE_S if compiled else 20,
            )
    stage("profile", lambda: profile_step(report, device, batch=options.step_batch), needs_s=15)
    if options.full:
        for batch in (8, 64, 256):
            for operator in options.operators:
                stage(
                    f"{operator}, batch {batch}",
                    lambda o=operator, b=batch: measure_operator(report, o, device, torch.bfloat16, b),
                )
    return report


if __name__ == "__main__":
    main()

"""What ``bench.gpu`` does besides measuring: the operators' tests, and a profile."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from audiomae import AudioMAEConfig
from bench.gpu_report import Report
from bench.step import build_pretraining_step
from bench.turns import unmarked

ROOT = Path(__file__).resolve().parents[1]
RESULT = re.compile(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)


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


def profile_step(report: Report, device: torch.device, batch: int, config: AudioMAEConfig | None = None) -> None:
    """Find what the fused step spends its time on."""
    step = build_pretraining_step("auto", device, batch, torch.bfloat16, config)
    for turn in range(3):
        step(turn, unmarked)
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA, activity.CPU] if device.type == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        step(0, unmarked)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    report.profile = profile.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)

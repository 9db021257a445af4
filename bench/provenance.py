"""Where and with what a figure was measured."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def provenance(device: torch.device) -> dict[str, str | int]:
    """Device, threads, versions, commit and date, for every row of results."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        **({"driver": _driver()} if device.type == "cuda" else {}),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "triton", "timm")},
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


@cache
def _commit() -> str:
    """Of the source when it was first asked for, which is about when it was loaded."""
    return _output(["git", "describe", "--always", "--dirty"])


@cache
def _driver() -> str:
    """Version of the GPU's driver."""
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).partition("\n")[0]


def _output(command: Sequence[str]) -> str:
    """What a command prints, or ``"unknown"``."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


@cache
def _processor() -> str:
    """Name of the processor, as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

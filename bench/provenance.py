"""Where and with what a figure was measured."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch


def provenance(device: torch.device) -> dict[str, str | int]:
    """Device, threads, versions, commit and date, for every row of results."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    """Name of the processor, as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""With what a run was started: command, versions, commit, and where."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from audiomae.training.distributed import Ranks

PACKAGES = ("audiomae", "mae-kernels", "torch", "torchaudio", "triton", "timm", "numpy", "soundfile", "flash-attn")


def describe_launch(ranks: Ranks) -> dict[str, Any]:
    """Tell how and where this process was started, in plain values."""
    on_gpu = ranks.device.type == "cuda"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "ranks": ranks.world_size,
        "device_type": ranks.device.type,
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else platform.machine(),
        "commit": source_commit(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        **{package: package_version(package) for package in PACKAGES},
    }


def package_version(package: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """Commit of the checkout that this package runs from, ``-dirty`` if changed; None where it is no checkout."""
    package = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(package)]
    try:
        # Of a package that is installed inside another project's checkout, that project's commit would mislead.
        listed = subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=False)
        if listed.returncode:
            return None
        done = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None

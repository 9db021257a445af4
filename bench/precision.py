"""How benchmarks run in a precision, and what they call it."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to bfloat16 or float16; float32 and float64 are none."""
    return torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

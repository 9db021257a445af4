"""Autocast at the boundary of an operator, where it is read once: below, dtypes are plain arguments."""

import torch


def compute_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which autocast would have an operator of this device run on ``dtype``."""
    if device_type == "meta":  # a tensor without storage stands for a GPU's
        device_type = "cuda"
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype

"""Optimiser and learning rate."""

import math

import torch
from torch import nn


def build_adamw(model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays every parameter of two or more dimensions, class and mask token included, as published.

    Args:
        model: Its trainable parameters are optimised.
        lr: Learning rate.
        weight_decay: Decay of matrices; vectors (biases, norms, temperatures) have none.
        betas: Decay of the two moments.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def cosine_lr(step: float, *, total: float, warmup: float, peak: float, minimum: float) -> float:
    """Learning rate of a half-cycle cosine with linear warm-up (Loshchilov & Hutter 2017).

    Args:
        step: Steps taken so far, 0 for the first.
        total: Steps of the run.
        warmup: Steps over which the rate rises from 0 to ``peak``.
        peak: Highest rate.
        minimum: Rate at the end.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

"""Optimiser and learning rate."""

import math

import torch
from torch import nn

from audiomae.classifier import AudioClassifier


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


def build_layer_decayed_adamw(
    model: AudioClassifier, *, lr: float, weight_decay: float, betas: tuple[float, float], layer_decay: float
) -> torch.optim.AdamW:
    """AdamW for fine-tuning, with a lower learning rate the further a layer is from the head (Clark et al. 2020).

    The head and its norm learn at ``lr``, block i of n at ``lr * layer_decay ** (n - i)`` counted from 0, and what is
    before the blocks at ``lr * layer_decay ** (n + 1)``, as in published fine-tuning.

    Args:
        model: Its trainable parameters are optimised.
        lr: Learning rate.
        weight_decay: Decay of matrices; vectors and the class token have none.
        betas: Decay of the two moments.
        layer_decay: Rate of a block over that of the block above it.
    """
    depth = model.config.depth
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.dim() >= 2 and name != "encoder.cls_token" else 0.0
            scale = layer_decay ** (depth + 1 - _layer(name, depth))
            groups.setdefault((decay, scale), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in groups.items()],
        lr=lr,
        betas=betas,
        fused=True,
    )


def _layer(name: str, depth: int) -> int:
    """Number of the layer that a classifier's parameter belongs to: 0 before the blocks, then they, then the head."""
    parts = name.split(".")
    if parts[:2] == ["encoder", "blocks"]:
        return int(parts[2]) + 1
    return 0 if parts[0] == "encoder" else depth + 1


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups, each times its own ``lr_scale`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


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

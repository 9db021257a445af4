"""Parts of blocks that several libraries have: additions with their norms, drop paths, cosines, MLPs."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mae_kernels.ops.add_layer_norm import add_layer_norm
from mae_kernels.ops.layer_norm_add import layer_norm_add
from mae_kernels.patching.core import find_unexpected

# F.normalize takes a norm for 1e-12 at least; window_attention has one bound for a product of two.
_LEAST_NORMS = 1e-24
_LARGEST_SCALE = 100.0


def add_to_stream(
    branch: Tensor, stream: Tensor, norm: nn.LayerNorm, drop: nn.Module, rate: float | None, impl: str
) -> tuple[Tensor, Tensor]:
    """Add a branch, with the drop path after it, to the stream, and normalise the sum.

    Args:
        branch: ``(B, ..., D)``.
        stream: ``(B, ..., D)``.
        norm: Of the next branch.
        drop: The drop path, which multiplies all values of a sample by one number.
        rate: Of the drop path.
        impl: Form of the operator.

    Returns:
        The new stream, in the dtype that a plain addition gives, and the input of the next branch.
    """
    scale = draw_scale(drop, rate, branch)
    return add_layer_norm(branch, stream, norm.weight, norm.bias, eps=norm.eps, branch_scale=scale, impl=impl)


def add_normed(
    branch: Tensor, stream: Tensor, norm: nn.LayerNorm, drop: nn.Module, rate: float | None, impl: str
) -> Tensor:
    """Normalise a branch and add it, with the drop path between, to the stream.

    Args:
        branch: ``(B, ..., D)``.
        stream: ``(B, ..., D)``.
        norm: Of the branch.
        drop: The drop path, which multiplies all values of a sample by one number.
        rate: Of the drop path.
        impl: Form of the operator.

    Returns:
        The new stream, in the dtype that a plain addition gives.
    """
    dtype = normed_dtype(branch)
    scale = draw_scale(drop, rate, branch, dtype)
    stream = stream.to(torch.promote_types(stream.dtype, dtype))
    return layer_norm_add(branch, stream, norm.weight, norm.bias, eps=norm.eps, branch_scale=scale, impl=impl)


def normed_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a LayerNorm makes of ``x``: autocast runs it in float32, but not on CPUs."""
    device_type = "cuda" if x.device.type == "meta" else x.device.type
    if device_type != "cpu" and torch.is_autocast_enabled(device_type):
        return torch.promote_types(x.dtype, torch.float32)
    return x.dtype


def draw_scale(drop: nn.Module, rate: float | None, branch: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """What a drop path would multiply the samples of ``branch (B, ...)`` by, ``(B,)``, drawn as it draws; None is 1."""
    return drop(branch.new_ones(branch.shape[0], dtype=dtype)) if drop.training and rate else None


def cosine_options(logit_scale: Tensor) -> dict[str, Any]:
    """What ``window_attention`` is told for attention by cosines with a learnt scale, one a head."""
    scale = logit_scale.clamp(max=math.log(_LARGEST_SCALE)).exp().flatten()
    return {"scale": scale, "cosine": True, "cosine_eps": _LEAST_NORMS}


def known_classes(part: nn.Module, stock: type[nn.Module], *names: str) -> tuple[type[nn.Module], ...]:
    """Classes that a part may have: ``stock``, and its own if that has one of the qualified ``names``."""
    own = type(part)
    return (stock, own) if f"{own.__module__}.{own.__qualname__}" in names else (stock,)


def find_norm_refusal(module: nn.Module, path: str) -> str | None:
    """Why an operator cannot stand for the LayerNorm that a module has at a path; None if it can."""
    norm: Any = module.get_submodule(path)
    unexpected = find_unexpected(module, {path: known_classes(norm, nn.LayerNorm, "timm.layers.norm.LayerNorm")})
    if unexpected is not None:
        return unexpected
    if norm.weight is None or norm.bias is None:
        return f"{path} has no weight or no bias"
    if len(norm.normalized_shape) != 1:
        return f"{path} normalises {len(norm.normalized_shape)} axes, expected 1"
    if getattr(norm, "_fast_norm", False):
        return f"{path} is a fast norm, whose dtype under autocast is another"
    return None


def find_mlp_refusal(module: nn.Module, fc1: str, act: str, drop: str, fc2: str) -> str | None:
    """Why ``mlp`` cannot stand for linear, GELU, dropout, linear at these paths of a module; None if it can."""
    parts: dict[str, Any] = {path: module.get_submodule(path) for path in (fc1, act, drop, fc2)}
    gelu = known_classes(parts[act], nn.GELU, "timm.layers.activations.GELU")
    unexpected = find_unexpected(module, {fc1: nn.Linear, act: gelu, drop: nn.Dropout, fc2: nn.Linear})
    if unexpected is not None:
        return unexpected
    if getattr(parts[act], "approximate", "none") != "none":
        return f"{act} is GELU by its {parts[act].approximate} approximation, expected the exact one"
    for path in (fc1, fc2):
        if parts[path].bias is None:
            return f"{path} has no bias"
    if parts[drop].p > 0:
        return f"{drop} drops activations at a rate of {parts[drop].p}"
    return None

"""Fused forms of timm's Vision Transformer: attention, the first addition with the norm after it, and the MLP.

Each is replaced for itself, and a block calls the others as modules: where one of them cannot be fused, the rest is. Of
a block, ``norm2`` and the first drop path are not called as modules; of an MLP, all but the second dropout are not.
Masks, and dropouts that were turned on since, run as they did.

timm 0.9.16 to 1.0.31 is known.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mae_kernels.ops.add_layer_norm import add_layer_norm
from mae_kernels.ops.flash_attention import flash_attention
from mae_kernels.ops.mlp import mlp
from mae_kernels.patching.core import Fused, Target, find_unexpected


class ViTAttention(Fused, nn.Module):
    """``flash_attention`` on views of the packed queries, keys and values."""

    attn_drop: nn.Dropout
    fused_attn: bool
    k_norm: nn.Module
    num_heads: int
    proj: nn.Module
    proj_drop: nn.Module
    q_norm: nn.Module
    qkv: nn.Module
    scale: float

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Attend over ``x (B, N, C)``; with a mask, or causally, as the class does."""
        is_masked = any(value is not None and value is not False for value in (*arguments, *options.values()))
        if is_masked or (self.training and self.attn_drop.p > 0):
            return super().forward(x, *arguments, **options)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        # A norm is given what it is given by the class, (B, heads, N, d).
        q, k = (norm(part.transpose(1, 2)).transpose(1, 2) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        scale = None if self.fused_attn else self.scale
        out = flash_attention(q, k, v, scale=scale, impl=self.fused_impl).flatten(2)
        # Older versions have neither.
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class ViTMlp(Fused, nn.Module):
    """``mlp``, and the dropout after it."""

    drop1: nn.Dropout
    drop2: nn.Module
    fc1: nn.Linear
    fc2: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Apply linear, GELU, linear to the last axis of ``x``."""
        if self.training and self.drop1.p > 0:
            return super().forward(x)
        fc1, fc2 = self.fc1, self.fc2
        return self.drop2(mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, impl=self.fused_impl))


class ViTBlock(Fused, nn.Module):
    """``add_layer_norm`` between the two branches."""

    attn: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.LayerNorm

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Apply the block to ``x (B, N, C)``; what else comes, a mask, is the attention's."""
        branch = self.ls1(self.attn(self.norm1(x), *arguments, **options))
        rate = getattr(self.drop_path1, "drop_prob", 0.0)
        x, normed = add_to_stream(branch, x, self.norm2, self.drop_path1, rate, self.fused_impl)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))


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


def draw_scale(drop: nn.Module, rate: float | None, branch: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """What a drop path would multiply the samples of ``branch (B, ...)`` by, ``(B,)``, drawn as it draws; None is 1."""
    return drop(branch.new_ones(branch.shape[0], dtype=dtype)) if drop.training and rate else None


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


def find_attention_refusal(module: Any) -> str | None:
    """Why an Attention cannot be fused; None if it can."""
    # The explicit form calls the dropout, and some read the attention's weights there.
    unexpected = find_unexpected(module, {"attn_drop": nn.Dropout})
    if unexpected is not None:
        return unexpected
    return f"attn_drop drops attention at a rate of {module.attn_drop.p}" if module.attn_drop.p > 0 else None


def find_timm_mlp_refusal(module: Any) -> str | None:
    """Why an Mlp cannot be fused; None if it can."""
    return find_mlp_refusal(module, "fc1", "act", "drop1", "fc2") or find_unexpected(module, {"norm": nn.Identity})


def find_block_refusal(module: Any) -> str | None:
    """Why a Block cannot be fused; None if it can."""
    drop = known_classes(module.drop_path1, nn.Identity, "timm.layers.drop.DropPath")
    return find_unexpected(module, {"drop_path1": drop}) or find_norm_refusal(module, "norm2")


TARGETS: tuple[Target, ...] = (
    Target("timm.models.vision_transformer.Block", ViTBlock, ("add_layer_norm",), find_block_refusal),
    Target("timm.layers.attention.Attention", ViTAttention, ("flash_attention",), find_attention_refusal),
    Target("timm.models.vision_transformer.Attention", ViTAttention, ("flash_attention",), find_attention_refusal),
    Target("timm.layers.mlp.Mlp", ViTMlp, ("mlp",), find_timm_mlp_refusal),
)

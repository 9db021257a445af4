"""Fused forms of torchvision's Swin Transformer, V1 and V2: window attention, additions with their norms, and the MLP.

Each is replaced for itself, and a block calls the others as modules: where one of them cannot be fused, the rest is. A
block's norms (V1: ``norm2``) and its first stochastic depth (V2: both) are not called as modules, and all of an MLP but
its last dropout is not; of its attention's linear layers, torchvision itself takes the parameters alone.

A grid that the window does not divide is padded as torchvision pads it: with zeros before the queries, keys and values
are made, which take part in attention.

torchvision 0.26 and 0.27 are known.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_kernels.ops.mlp import mlp
from mae_kernels.ops.window_attention import window_attention
from mae_kernels.patching.core import Fused, Target, find_unexpected
from mae_kernels.patching.parts import (
    add_normed,
    add_to_stream,
    cosine_options,
    find_mlp_refusal,
    find_norm_refusal,
    known_classes,
)


def attend_windows(module: Any, x: Tensor, qkv_bias: Tensor | None, **options: Any) -> Tensor:
    """Attend in windows of ``x (B, H, W, C)``, between the linear layers of a module.

    Args:
        module: A ShiftedWindowAttention.
        x: Tokens.
        qkv_bias: Of queries, keys and values, ``(3 C,)``.
        **options: Of ``window_attention``, for the kind of attention.

    Returns:
        ``(B, H, W, C)``.
    """
    rows, columns = x.shape[1:3]
    window = module.window_size[0], module.window_size[1]
    pad = -rows % window[0], -columns % window[1]
    if any(pad):
        x = F.pad(x, (0, 0, 0, pad[1], 0, pad[0]))
    grid = rows + pad[0], columns + pad[1]
    # A window that covers an axis is not shifted along it.
    shift = tuple(s if side < size else 0 for s, side, size in zip(module.shift_size, window, grid, strict=True))
    out = window_attention(
        F.linear(x.flatten(1, 2), module.qkv.weight, qkv_bias),
        num_heads=module.num_heads,
        grid=grid,
        window=window,
        shift=shift,
        bias=module.get_relative_position_bias().squeeze(0),
        impl=module.fused_impl,
        **options,
    )
    out = out.unflatten(1, grid)[:, :rows, :columns]
    return F.linear(out, module.proj.weight, module.proj.bias)


class WindowAttention(Fused, nn.Module):
    """``window_attention`` with the bias of a table."""

    attention_dropout: float
    dropout: float
    qkv: Any

    def forward(self, x: Tensor) -> Tensor:
        """Attend in windows of ``x (B, H, W, C)``."""
        if self.training and (self.attention_dropout > 0 or self.dropout > 0):
            return super().forward(x)
        return attend_windows(self, x, self.qkv.bias)


class WindowAttentionV2(Fused, nn.Module):
    """``window_attention`` by cosines, with a learnt scale and the bias of a small MLP."""

    attention_dropout: float
    dropout: float
    logit_scale: Tensor
    qkv: Any

    def forward(self, x: Tensor) -> Tensor:
        """Attend in windows of ``x (B, H, W, C)``."""
        if self.training and (self.attention_dropout > 0 or self.dropout > 0):
            return super().forward(x)
        bias = self.qkv.bias
        if bias is not None:  # the keys' part is there, and not used
            of_q, of_k, of_v = bias.chunk(3)
            bias = torch.cat((of_q, torch.zeros_like(of_k), of_v))
        return attend_windows(self, x, bias, **cosine_options(self.logit_scale))


class SwinMlp(Fused, nn.Module):
    """``mlp``, and the dropout after it."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply linear, GELU, linear to the last axis of ``x``."""
        layers: Any = self
        fc1, _, inner_drop, fc2, drop = layers
        if self.training and inner_drop.p > 0:
            return super().forward(x)
        return drop(mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, impl=self.fused_impl))


class SwinBlock(Fused, nn.Module):
    """``add_layer_norm`` between the two branches of a pre-norm block."""

    attn: nn.Module
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.LayerNorm
    stochastic_depth: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x (B, H, W, C)``."""
        drop = self.stochastic_depth
        branch = self.attn(self.norm1(x))
        x, normed = add_to_stream(branch, x, self.norm2, drop, getattr(drop, "p", 0.0), self.fused_impl)
        return x + drop(self.mlp(normed))


class SwinBlockV2(Fused, nn.Module):
    """``layer_norm_add`` after each branch of a post-norm block."""

    attn: nn.Module
    mlp: nn.Module
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    stochastic_depth: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x (B, H, W, C)``."""
        drop = self.stochastic_depth
        rate = getattr(drop, "p", 0.0)
        for branch, norm in ((self.attn, self.norm1), (self.mlp, self.norm2)):
            x = add_normed(branch(x), x, norm, drop, rate, self.fused_impl)
        return x


def find_attention_refusal(module: Any) -> str | None:
    """Why a ShiftedWindowAttention cannot be fused; None if it can."""
    if module.attention_dropout > 0:
        return f"attention_dropout is {module.attention_dropout}"
    if module.dropout > 0:
        return f"dropout is {module.dropout}, drawn in the order of windows"
    window, shift = tuple(module.window_size), tuple(module.shift_size)
    if any(not 0 <= s < side for s, side in zip(shift, window, strict=True)):
        return f"shift_size is {shift}, expected 0 or more and less than the window {window}"
    return None


def find_torchvision_mlp_refusal(module: Any) -> str | None:
    """Why an MLP cannot be fused; None if it can."""
    if len(module) != 5:
        return f"has {len(module)} layers, expected 5: linear, GELU, dropout, linear, dropout"
    return find_mlp_refusal(module, "0", "1", "2", "3")


def find_depth_refusal(module: Any) -> str | None:
    """Why a block's stochastic depth cannot be drawn beforehand; None if it can."""
    name = "torchvision.ops.stochastic_depth.StochasticDepth"
    return find_unexpected(module, {"stochastic_depth": known_classes(module.stochastic_depth, nn.Identity, name)})


def find_block_refusal(module: Any) -> str | None:
    """Why a SwinTransformerBlock cannot be fused; None if it can."""
    return find_depth_refusal(module) or find_norm_refusal(module, "norm2")


def find_block_v2_refusal(module: Any) -> str | None:
    """Why a SwinTransformerBlockV2 cannot be fused; None if it can."""
    return find_block_refusal(module) or find_norm_refusal(module, "norm1")


_SWIN = "torchvision.models.swin_transformer"

TARGETS: tuple[Target, ...] = (
    Target(f"{_SWIN}.SwinTransformerBlock", SwinBlock, ("add_layer_norm",), find_block_refusal),
    Target(f"{_SWIN}.SwinTransformerBlockV2", SwinBlockV2, ("layer_norm_add",), find_block_v2_refusal),
    Target(f"{_SWIN}.ShiftedWindowAttention", WindowAttention, ("window_attention",), find_attention_refusal),
    Target(f"{_SWIN}.ShiftedWindowAttentionV2", WindowAttentionV2, ("window_attention",), find_attention_refusal),
    Target("torchvision.ops.misc.MLP", SwinMlp, ("mlp",), find_torchvision_mlp_refusal),
)

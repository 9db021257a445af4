"""Fused forms of timm's Vision Transformer: attention, the first addition with the norm after it, and the MLP.

Each is replaced for itself, and a block calls the others as modules: where one of them cannot be fused, the rest is. Of
a block, ``norm2`` and the first drop path are not called as modules; of an MLP, all but the second dropout are not.
Masks, and dropouts that were turned on since, run as they did.

timm 0.9.16 to 1.0.31 is known.
"""

from typing import Any

from torch import Tensor, nn

from mae_kernels.ops.flash_attention import flash_attention
from mae_kernels.ops.mlp import mlp
from mae_kernels.patching.core import Fused, Target, find_unexpected
from mae_kernels.patching.parts import add_to_stream, find_mlp_refusal, find_norm_refusal, known_classes


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

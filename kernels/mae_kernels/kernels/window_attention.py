"""Kernels of :mod:`mae_kernels.ops.window_attention`: the mathematics and the tensors are told there.

Shift, partition, padding and merge are arithmetic on indices: a program loads a window's queries, keys and values from
where they lie, and stores its output there. All keys of a query are in the tile, so the softmax is an ordinary one.
Nothing is saved for backward but the arguments.

Small windows are a warp each: its products, its softmax and its changes of layout wait for nobody. Programs are
persistent: each keeps the bias of its head, and goes through windows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels._autocast import compute_dtype
from mae_kernels.kernels._registration import register
from mae_kernels.kernels._windows import Cut, add_mask, as_operand, exp, locate, reciprocal_norms
from mae_kernels.kernels.window_attention_backward import window_attention_backward

# Places of the largest window that is one tile, in 16 bits.
_WHOLE = 64

# Warps that a multiprocessor holds at once, for tiles of 16 queries and keys, and larger ones.
_RESIDENT_WARPS = (24, 16)


@triton.jit
def _forward_kernel(
    qkv_ptr,  # (B, L, 3, HEADS, DIM)
    bias_ptr,  # (HEADS, BLOCK_A, BLOCK_A) float32, or None
    scale_ptr,  # (HEADS,), or None
    out_ptr,  # (B, L, HEADS, DIM)
    windows,
    scale,  # where scale_ptr is None
    largest_reciprocal,  # of a product of norms
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GRID: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ON_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * DIM
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    # Heads run fastest: programs that read the pieces of one token's row run side by side.
    head = tl.program_id(0) % HEADS
    i = tl.program_id(0) // HEADS % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.arange(0, BLOCK_A)
    column = tl.arange(0, BLOCK_D)[None, :]
    if HAS_SCALE:
        scale = tl.load(scale_ptr + head).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + (head * BLOCK_A + i[:, None]) * BLOCK_A + j[None, :])
    for window in range(tl.program_id(0) // (HEADS * BLOCKS), windows, tl.num_programs(0) // (HEADS * BLOCKS)):
        token, there = locate(window, i[:, None], GRID, PADDED, WINDOW, SHIFT)
        inside_q = there & (column < DIM)
        q = as_operand(tl.load(qkv_ptr + token * (3 * WIDTH) + (head * DIM + column), mask=inside_q, other=0.0), DTYPE)
        at_out = token * WIDTH + (head * DIM + column)
        token, there = locate(window, j[:, None], GRID, PADDED, WINDOW, SHIFT)
        inside_k = there & (column < DIM)
        at_k = token * (3 * WIDTH) + (WIDTH + head * DIM + column)
        k = as_operand(tl.load(qkv_ptr + at_k, mask=inside_k, other=0.0), DTYPE)
        v = as_operand(tl.load(qkv_ptr + at_k + WIDTH, mask=inside_k, other=0.0), DTYPE)

        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if COSINE:
            reciprocal_q, reciprocal_k = reciprocal_norms(q, k, ON_DIAGONAL)
            product *= tl.minimum(reciprocal_q[:, None] * reciprocal_k[None, :], largest_reciprocal)
        logits = product * scale
        if HAS_BIAS:
            logits += bias
        logits = add_mask(logits, window, i, j, GRID, PADDED, WINDOW, SHIFT)
        p = exp(logits - tl.max(logits, axis=1)[:, None])
        p *= (1 / tl.sum(p, axis=1))[:, None]
        tl.store(out_ptr + at_out, tl.dot(as_operand(p, DTYPE), v, input_precision=PRECISION), mask=inside_q)


def _forward_outputs(
    qkv: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    cosine_eps: float | None,
    num_heads: int,
    layout: list[int],
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))


@register(outputs=_forward_outputs)
def window_attention_forward(
    qkv: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    cosine_eps: float | None,
    num_heads: int,
    layout: list[int],
) -> Tensor:
    """Contiguous ``qkv (B, L, 3 C)`` -> ``(B, L, C)``. Without ``cosine_eps`` the products are not divided by norms."""
    out = _forward_outputs(qkv, bias, scale, scale_value, cosine_eps, num_heads, layout)
    cut = Cut(qkv, num_heads, layout)
    tile = cut.tile(_WHOLE)
    workers = cut.workers(tile, resident_warps=_RESIDENT_WARPS[cut.block_a > 16])
    bias = cut.tiled_bias(bias)
    _forward_kernel[(workers * tile.blocks * num_heads,)](
        qkv,
        bias,
        scale,
        out,
        cut.windows,
        scale_value,
        1 / cosine_eps if cosine_eps else math.inf,
        **cut.constants(),
        BLOCK_Q=tile.block,
        BLOCKS=tile.blocks,
        COSINE=cosine_eps is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        num_warps=tile.warps,
    )
    return out


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, scale, scale_value, cosine_eps, num_heads, layout):
        ctx.save_for_backward(qkv, bias, scale)
        ctx.options = (scale_value, cosine_eps, num_heads, layout)
        return window_attention_forward(qkv, bias, scale, scale_value, cosine_eps, num_heads, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, bias, scale = ctx.saved_tensors
        _, needs_bias, needs_scale, *_ = ctx.needs_input_grad
        d_qkv, d_bias, d_scale = window_attention_backward(
            grad.contiguous(), qkv, bias, scale, *ctx.options, needs_bias, needs_scale
        )
        d_bias = d_bias.to(bias.dtype) if needs_bias else None
        d_scale = d_scale.to(scale.dtype) if needs_scale else None
        return d_qkv, d_bias, d_scale, None, None, None, None


def window_attention(
    qkv: Tensor,
    num_heads: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
    scale: Tensor | float,
    cosine: bool,
    cosine_eps: float,
) -> Tensor:
    """Attend inside windows where they lie."""
    qkv = qkv.to(compute_dtype(qkv.device.type, qkv.dtype)).contiguous()
    if bias is not None:
        bias = bias.contiguous()
    scale_tensor, scale_value = (scale.contiguous(), 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    eps = max(float(cosine_eps), 0.0) if cosine else None
    return _WindowAttention.apply(qkv, bias, scale_tensor, scale_value, eps, num_heads, [*grid, *window, *shift])

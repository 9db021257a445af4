r"""Backward of :mod:`mae_kernels.kernels.window_attention`, which recomputes the probabilities.

With :math:`u_{ij} = 1 / \max(|q_i| |k_j|, \epsilon)`, or 1 without ``cosine``, and the gradient of the logits
:math:`g_{ij} = p_{ij} (dp_{ij} - \sum_j p_{ij} \, dp_{ij})`, the gradient of the queries is

.. math:: dq_i = s \sum_j g_{ij} u_{ij} \, k_j - s \, \frac{q_i}{|q_i|^2} \sum_{j : |q_i| |k_j| \ge \epsilon}
    g_{ij} u_{ij} \langle q_i, k_j \rangle

with the second sum only with ``cosine``; that of the keys is alike. The scale's is the sum of :math:`g_{ij} u_{ij}
\langle q_i, k_j \rangle`, and the bias's the sum of :math:`g` over windows, which a capped number of programs add up in
registers before it is summed over programs.

A window that fits one tile gets all its gradients from it. Larger ones take two passes: blocks of queries with all
keys, which leave each query's sums to the second, and blocks of keys with all queries.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mae_kernels.kernels._registration import register
from mae_kernels.kernels._windows import Cut, add_mask, as_operand, exp, locate, reciprocal_norms

# Places of the largest window that is one tile, in 16 bits: heads of up to 32 leave registers for larger ones.
_WHOLE, _WHOLE_NARROW = 32, 64

# Warps that a multiprocessor holds at once, for tiles of 16 queries and keys, and larger ones.
_RESIDENT_WARPS = (18, 8)


@triton.jit
def _backward_kernel(
    grad_ptr,  # (B, L, HEADS, DIM)
    qkv_ptr,  # (B, L, 3, HEADS, DIM)
    bias_ptr,  # (HEADS, BLOCK_A, BLOCK_A) float32, or None
    scale_ptr,  # (HEADS,), or None
    d_qkv_ptr,  # (B, L, 3, HEADS, DIM)
    d_bias_ptr,  # (workers, HEADS, BLOCK_A, BLOCK_A) float32, written if HAS_DBIAS
    d_scale_ptr,  # (workers, BLOCKS, HEADS) float32, written if HAS_DSCALE
    total_ptr,  # (windows, HEADS, BLOCK_A) float32: log of the softmax's sum, handed from queries to keys
    along_ptr,  # (windows, HEADS, BLOCK_A) float32: sum of p dp, likewise
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
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    HAS_DSCALE: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    OF_KEYS: tl.constexpr,
    ON_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * DIM
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    head = tl.program_id(0) % HEADS
    block = tl.program_id(0) // HEADS % BLOCKS
    worker = tl.program_id(0) // (HEADS * BLOCKS)
    i = tl.arange(0, BLOCK_Q)
    j = tl.arange(0, BLOCK_K)
    if BLOCK_Q < BLOCK_A:
        i += block * BLOCK_Q
    if BLOCK_K < BLOCK_A:
        j += block * BLOCK_K
    column = tl.arange(0, BLOCK_D)[None, :]
    if HAS_SCALE:
        scale = tl.load(scale_ptr + head).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + (head * BLOCK_A + i[:, None]) * BLOCK_A + j[None, :])
    d_bias = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
    d_scale = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for window in range(worker, windows, tl.num_programs(0) // (HEADS * BLOCKS)):
        token, there = locate(window, i[:, None], GRID, PADDED, WINDOW, SHIFT)
        inside_q = there & (column < DIM)
        at_q = token * (3 * WIDTH) + (head * DIM + column)
        q = as_operand(tl.load(qkv_ptr + at_q, mask=inside_q, other=0.0), DTYPE)
        grad = as_operand(tl.load(grad_ptr + token * WIDTH + (head * DIM + column), mask=inside_q, other=0.0), DTYPE)
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
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        at_sums = (tl.cast(window, tl.int64) * HEADS + head) * BLOCK_A + i
        if OF_QUERIES:
            largest = tl.max(logits, axis=1)
            p = exp(logits - largest[:, None])
            total = tl.sum(p, axis=1)
            p *= (1 / total)[:, None]
            along = tl.sum(p * dp, axis=1)
            if not OF_KEYS:
                tl.store(total_ptr + at_sums, largest + tl.log(total))
                tl.store(along_ptr + at_sums, along)
        else:
            total = tl.load(total_ptr + at_sums, mask=i < WINDOW[0] * WINDOW[1], other=float("inf"))
            p = exp(logits - total[:, None])
            along = tl.load(along_ptr + at_sums, mask=i < WINDOW[0] * WINDOW[1], other=0.0)
        d_logits = p * (dp - along[:, None])
        if HAS_DBIAS:
            d_bias += d_logits
        if HAS_DSCALE:
            d_scale += tl.sum(d_logits * product, axis=1)
        if COSINE:
            # Twice the same reciprocals: a compiler that knew them would keep them, in a register for each logit.
            twice = (2 * reciprocal_q)[:, None] * reciprocal_k[None, :]
            along_norms = tl.where(twice <= 2 * largest_reciprocal, d_logits * product, 0.0) * scale
            d_product = d_logits * (0.5 * scale) * tl.minimum(twice, 2 * largest_reciprocal)
        else:
            d_product = d_logits * scale
        d_product = as_operand(d_product, DTYPE)
        if OF_KEYS:
            d_v = tl.dot(tl.trans(as_operand(p, DTYPE)), grad, input_precision=PRECISION)
            tl.store(d_qkv_ptr + at_k + WIDTH, d_v, mask=inside_k)
        if OF_QUERIES:
            d_q = tl.dot(d_product, k, input_precision=PRECISION)
            if COSINE:
                radial = tl.sum(along_norms, axis=1) * reciprocal_q * reciprocal_q
                if ON_DIAGONAL:
                    radial = tl.where(i[:, None] == j[None, :], -radial[:, None], 0.0)
                    d_q = tl.dot(as_operand(radial, DTYPE), q, d_q)
                else:
                    d_q -= radial[:, None] * q
            tl.store(d_qkv_ptr + at_q, d_q, mask=inside_q)
        if OF_KEYS:
            d_k = tl.dot(tl.trans(d_product), q, input_precision=PRECISION)
            if COSINE:
                radial = tl.sum(along_norms, axis=0) * reciprocal_k * reciprocal_k
                if ON_DIAGONAL:
                    radial = tl.where(i[:, None] == j[None, :], -radial[None, :], 0.0)
                    d_k = tl.dot(as_operand(radial, DTYPE), k, d_k)
                else:
                    d_k -= radial[:, None] * k
            tl.store(d_qkv_ptr + at_k, d_k, mask=inside_k)
    if HAS_DBIAS:
        tl.store(d_bias_ptr + ((worker * HEADS + head) * BLOCK_A + i[:, None]) * BLOCK_A + j[None, :], d_bias)
    if HAS_DSCALE:
        tl.store(d_scale_ptr + tl.program_id(0), tl.sum(d_scale))


def _backward_outputs(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    cosine_eps: float | None,
    num_heads: int,
    layout: list[int],
    needs_bias: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    area = layout[2] * layout[3]
    d_bias = qkv.new_empty((num_heads, area, area) if needs_bias else 0, dtype=torch.float32)
    d_scale = qkv.new_empty(num_heads if needs_scale else 0, dtype=torch.float32)
    return torch.empty_like(qkv), d_bias, d_scale


@register(outputs=_backward_outputs)
def window_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    cosine_eps: float | None,
    num_heads: int,
    layout: list[int],
    needs_bias: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradient ``(B, L, C)`` -> gradients of qkv, and of bias and scale, or empty."""
    outputs = _backward_outputs(
        grad, qkv, bias, scale, scale_value, cosine_eps, num_heads, layout, needs_bias, needs_scale
    )
    d_qkv, d_bias, d_scale = outputs
    cut = Cut(qkv, num_heads, layout)
    tile = cut.tile(_WHOLE if cut.block_d > 32 else _WHOLE_NARROW)
    workers = cut.workers(tile, resident_warps=_RESIDENT_WARPS[cut.block_a > 16])
    whole = tile.blocks == 1
    bias = cut.tiled_bias(bias)
    bias_sums = d_bias.new_empty((workers, num_heads, cut.block_a, cut.block_a) if needs_bias else 0)
    scale_sums = d_scale.new_empty((workers, tile.blocks, num_heads) if needs_scale else 0)
    totals, alongs = d_bias.new_empty((2, 0 if whole else cut.windows, num_heads, cut.block_a))
    for of_queries, of_keys in [(True, True)] if whole else [(True, False), (False, True)]:
        _backward_kernel[(workers * tile.blocks * num_heads,)](
            grad,
            qkv,
            bias,
            scale,
            d_qkv,
            bias_sums,
            scale_sums,
            totals,
            alongs,
            cut.windows,
            scale_value,
            1 / cosine_eps if cosine_eps else math.inf,
            **cut.constants(),
            BLOCK_Q=tile.block if of_queries else cut.block_a,
            BLOCK_K=tile.block if of_keys else cut.block_a,
            BLOCKS=tile.blocks,
            COSINE=cosine_eps is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            HAS_DBIAS=needs_bias and of_queries,
            HAS_DSCALE=needs_scale and of_queries,
            OF_QUERIES=of_queries,
            OF_KEYS=of_keys,
            num_warps=tile.warps,
        )
    if needs_bias:
        d_bias.copy_(bias_sums.sum(dim=0)[:, : cut.area, : cut.area])
    if needs_scale:
        torch.sum(scale_sums, dim=(0, 1), out=d_scale)
    return outputs

"""Kernels of :mod:`mae_kernels.ops.mlp`: the mathematics and the tensors are told there.

Products are the library's. What lies between them is memory traffic alone, and is one kernel a direction: bias and
GELU in forward; in backward the activation again, for the second weight, and the gradient of the pre-activation in
place of the activation's. Both work from ``hidden``, the first product before its bias, which is added in float32.

Forward keeps ``x`` and ``hidden``; without gradients the activation is written over ``hidden``. The gradient of the
first bias is summed by a capped number of programs, each over its own rows, and then over programs.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels._autocast import compute_dtype
from mae_kernels.kernels._registration import cover, num_programs, register

# Columns of a tile: a warp's 128-bit loads of 16-bit values span them. Backward holds a tile of sums besides, and has
# two tiles more on their way: at 64 registers a thread, 8 programs of 4 warps fill a multiprocessor.
_COLUMNS, _FORWARD_TILE, _BACKWARD_TILE = 256, 4096, 1024
_PROGRAMS, _STAGES = 8, 3

_MINUS_HALF_LOG2E = tl.constexpr(-0.72134752)
_RSQRT_2PI = tl.constexpr(0.39894228)


@triton.jit
def _normal_cdf(x):
    """Standard normal distribution function, to 1e-7: as exact as by ``erf`` in float32, in half the instructions.

    By their count on sm_90, forward's 38 a value with ``erf`` would take longer to issue than the memory of an H200
    takes to deliver; these are 18. The logarithm of the tail at -a is almost a parabola: this is the polynomial of
    degree 8 with the least error of the tail, times ``max(1, a)``, for a in [0, 8], 1.4e-8. Beyond, it only falls.
    """
    a = tl.abs(x)
    log2_tail = -2.27588029e-06 * a + 3.29681286e-05
    log2_tail = log2_tail * a - 1.57279381e-04
    log2_tail = log2_tail * a - 2.02477305e-04
    log2_tail = log2_tail * a + 7.14277938e-03
    log2_tail = log2_tail * a - 5.25464341e-02
    log2_tail = log2_tail * a - 4.59193058e-01
    log2_tail = log2_tail * a - 1.15110694
    log2_tail = log2_tail * a - 9.99999959e-01
    tail = tl.exp2(log2_tail)
    return tl.where(x < 0, tail, 1 - tail)


@triton.jit
def _activate_kernel(
    hidden_ptr,  # (rows, H)
    bias_ptr,  # (H,)
    activation_ptr,  # (rows, H), may be hidden
    rows,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # Columns first: what runs at a time covers whole rows.
    column_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    row = tl.program_id(0) // column_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % column_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (row < rows)[:, None] & (column < H)[None, :]
    place = row.to(tl.int64)[:, None] * H + column[None, :]

    bias = tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    x = tl.load(hidden_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(activation_ptr + place, x * _normal_cdf(x), mask=inside)


@triton.jit
def _backward_kernel(
    hidden_ptr,  # (rows, H)
    bias_ptr,  # (H,)
    grad_ptr,  # (rows, H): gradient of the activation in, of hidden out, if HAS_GRAD
    activation_ptr,  # (rows, H), written if WRITE_ACTIVATION
    d_bias_ptr,  # (programs, H) float32, written if HAS_GRAD
    rows,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    WRITE_ACTIVATION: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    bias = tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    d_bias = tl.zeros((BLOCK_ROWS, BLOCK_H), dtype=tl.float32)
    for block in tl.range(tl.program_id(1), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(1), num_stages=STAGES):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < H)[None, :]
        place = row.to(tl.int64)[:, None] * H + column[None, :]

        x = tl.load(hidden_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        cdf = _normal_cdf(x)
        if WRITE_ACTIVATION:
            tl.store(activation_ptr + place, x * cdf, mask=inside)
        if HAS_GRAD:
            density = tl.exp2(x * x * _MINUS_HALF_LOG2E) * _RSQRT_2PI
            grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32) * (cdf + x * density)
            tl.store(grad_ptr + place, grad, mask=inside)
            d_bias += grad
    if HAS_GRAD:
        partial = tl.program_id(1) * H + column
        tl.store(d_bias_ptr + partial, tl.sum(d_bias, axis=0), mask=column < H)


def _forward_outputs(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape[0], fc1_weight.shape[0]
    return x.new_empty(rows, fc2_weight.shape[0]), x.new_empty(rows if keep_hidden else 0, width)


@register(outputs=_forward_outputs)
def mlp_forward(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous ``x (N, D)`` and weights, all but ``fc1_bias`` in one dtype -> ``(N, E)`` and ``hidden (N, H)``.

    The second is empty if not kept.
    """
    out, kept = _forward_outputs(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, keep_hidden)
    rows, width = x.shape[0], fc1_weight.shape[0]
    activation = x.new_empty(rows, width)
    hidden = kept if keep_hidden else activation
    torch.mm(x, fc1_weight.t(), out=hidden)
    block_h = min(cover(width), _COLUMNS)
    block_rows = _FORWARD_TILE // block_h
    _activate_kernel[(triton.cdiv(rows, block_rows) * triton.cdiv(width, block_h),)](
        hidden,
        fc1_bias,
        activation,
        rows,
        H=width,
        BLOCK_ROWS=block_rows,
        BLOCK_H=block_h,
    )
    torch.addmm(fc2_bias, activation, fc2_weight.t(), out=out)
    return out, kept


def _backward_outputs(
    grad: Tensor,
    x: Tensor | None,
    hidden: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def allocate(argument: int, *shape: int, dtype: torch.dtype = grad.dtype) -> Tensor:
        return grad.new_empty(shape if needs[argument] else 0, dtype=dtype)

    (rows, out_dim), (width, dim) = grad.shape, fc1_weight.shape
    return (
        allocate(0, rows, dim),
        allocate(1, width, dim),
        allocate(2, width, dtype=torch.float32),
        allocate(3, out_dim, width),
        allocate(4, out_dim),
    )


@register(outputs=_backward_outputs)
def mlp_backward(
    grad: Tensor,
    x: Tensor | None,
    hidden: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient ``(N, E)`` of the output -> those of forward's first five arguments, empty where not in ``needs``.

    That of the first bias is float32, the others have the dtype of ``grad``. Only that of ``fc1_weight`` needs ``x``.
    """
    outputs = _backward_outputs(grad, x, hidden, fc1_weight, fc1_bias, fc2_weight, needs)
    d_x, d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias = outputs
    needs_x, needs_fc1_weight, needs_fc1_bias, needs_fc2_weight, needs_fc2_bias = needs
    needs_hidden = needs_x or needs_fc1_weight or needs_fc1_bias

    rows, width = hidden.shape
    block_h = min(cover(width), _COLUMNS)
    block_rows = _BACKWARD_TILE // block_h
    column_blocks = triton.cdiv(width, block_h)
    blocks = triton.cdiv(rows, block_rows) * column_blocks
    programs = max(num_programs(hidden, blocks, per_multiprocessor=_PROGRAMS) // column_blocks, 1)
    activation = hidden.new_empty(hidden.shape if needs_fc2_weight else 0)
    d_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0)
    partials = hidden.new_empty((programs, width) if needs_hidden else 0, dtype=torch.float32)
    if needs_hidden:
        torch.mm(grad, fc2_weight, out=d_hidden)
    if needs_hidden or needs_fc2_weight:
        _backward_kernel[(column_blocks, programs)](
            hidden,
            fc1_bias,
            d_hidden,
            activation,
            partials,
            rows,
            H=width,
            BLOCK_ROWS=block_rows,
            BLOCK_H=block_h,
            STAGES=_STAGES,
            HAS_GRAD=needs_hidden,
            WRITE_ACTIVATION=needs_fc2_weight,
        )
    if needs_fc2_weight:
        torch.mm(grad.t(), activation, out=d_fc2_weight)
    del activation  # so that it is not held through the products below
    if needs_fc2_bias:
        torch.sum(grad, dim=0, out=d_fc2_bias)
    if needs_x:
        torch.mm(d_hidden, fc1_weight, out=d_x)
    if needs_fc1_weight:
        assert x is not None
        torch.mm(d_hidden.t(), x, out=d_fc1_weight)
    if needs_fc1_bias:
        torch.sum(partials, dim=0, out=d_fc1_bias)
    return outputs


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        out, hidden = mlp_forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, True)
        ctx.bias_dtype = fc1_bias.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, hidden, fc1_weight, fc1_bias, fc2_weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, hidden, fc1_weight, fc1_bias, fc2_weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad)
        d_x, d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias = mlp_backward(
            grad.contiguous(), x, hidden, fc1_weight, fc1_bias, fc2_weight, needs
        )
        gradients = d_x, d_fc1_weight, d_fc1_bias.to(ctx.bias_dtype), d_fc2_weight, d_fc2_bias
        return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Two products of the library with one kernel between them, under autocast in its dtype."""
    dtype = compute_dtype(x.device.type, x.dtype)
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    rows, fc1_weight, fc2_weight, fc2_bias = (
        tensor.to(dtype).contiguous() for tensor in (rows, fc1_weight, fc2_weight, fc2_bias)
    )
    arguments = rows, fc1_weight, fc1_bias.contiguous(), fc2_weight, fc2_bias
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments):
        out = _Mlp.apply(*arguments)
    else:
        out, _ = mlp_forward(*arguments, keep_hidden=False)
    return out.view(*x.shape[:-1], out.shape[-1])

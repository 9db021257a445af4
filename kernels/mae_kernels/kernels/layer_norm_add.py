"""Kernels of :mod:`mae_kernels.ops.layer_norm_add`: the mathematics and the tensors are told there.

Forward saves its input and each row's mean and reciprocal deviation in float32; the gradient of the residual is that of
the output and costs nothing. Gradients of weight and bias are summed by a capped number of programs, each over its own
rows, and then over programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels.kernels._registration import cover, num_programs, register
from mae_kernels.kernels._rows import (
    BACKWARD_TILE,
    FORWARD_TILE,
    normalise_rows,
    normalise_rows_backward,
    rows_in_tile,
    warps_for,
)


@triton.jit
def _forward_kernel(
    x_ptr,  # (rows, D)
    residual_ptr,  # (rows, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    scale_ptr,  # (B,), or None
    out_ptr,  # (rows, D)
    mean_ptr,  # (rows,) float32
    rstd_ptr,  # (rows,) float32
    rows,
    rows_per_sample,
    eps,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    in_rows = row < rows
    inside = in_rows[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + column[None, :]

    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    normalised, mean, rstd = normalise_rows(x, inside, eps, D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    normed = normalised * weight[None, :] + bias[None, :]
    if HAS_SCALE:
        scale = tl.load(scale_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(tl.float32)
        normed *= scale[:, None]
    tl.store(out_ptr + place, residual + normed, mask=inside)
    tl.store(mean_ptr + row, mean, mask=in_rows)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)


@triton.jit
def _backward_kernel(
    grad_ptr,  # (rows, D)
    x_ptr,  # (rows, D)
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,), read for the gradient of the scale
    scale_ptr,  # (B,), or None
    d_x_ptr,  # (rows, D)
    d_scale_ptr,  # (rows,) float32, written if HAS_DSCALE
    d_weight_ptr,  # (programs, D) float32
    d_bias_ptr,  # (programs, D) float32
    rows,
    rows_per_sample,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_DSCALE: tl.constexpr,
):
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = row < rows
        inside = in_rows[:, None] & (column < D)[None, :]
        place = row.to(tl.int64)[:, None] * D + column[None, :]

        mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        normalised = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_DSCALE:
            bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
            normed = normalised * weight[None, :] + bias[None, :]
            tl.store(d_scale_ptr + row, tl.sum(grad * normed, axis=1), mask=in_rows)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(tl.float32)
            grad *= scale[:, None]
        d_weight += grad * normalised
        d_bias += grad
        d_x = normalise_rows_backward(grad * weight[None, :], normalised, rstd, D)
        tl.store(d_x_ptr + place, d_x, mask=inside)
    partial = tl.program_id(0) * D + column
    tl.store(d_weight_ptr + partial, tl.sum(d_weight, axis=0), mask=column < D)
    tl.store(d_bias_ptr + partial, tl.sum(d_bias, axis=0), mask=column < D)


def _forward_outputs(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype)), mean, rstd


@register(outputs=_forward_outputs)
def layer_norm_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous ``x``, ``residual (B, ..., D)`` -> the new stream, mean and reciprocal deviation ``(rows,)``."""
    out, mean, rstd = _forward_outputs(x, residual, weight, bias, scale, eps)
    rows, dim = mean.numel(), x.shape[-1]
    block_d = cover(dim)
    block_rows = rows_in_tile(block_d, FORWARD_TILE)
    _forward_kernel[(triton.cdiv(rows, block_rows),)](
        x,
        residual,
        weight,
        bias,
        scale,
        out,
        mean,
        rstd,
        rows,
        rows // max(x.shape[0], 1),
        eps,
        D=dim,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        HAS_SCALE=scale is not None,
        num_warps=warps_for(block_d, FORWARD_TILE),
    )
    return out, mean, rstd


def _backward_outputs(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    needs_scale_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_weight, d_bias = (weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), d_weight, d_bias, mean.new_empty(mean.shape if needs_scale_grad else 0)


@register(outputs=_backward_outputs)
def layer_norm_add_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    needs_scale_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous gradient of the output -> gradients of x, weight, bias, and of each row's scale if asked for."""
    outputs = _backward_outputs(grad, x, mean, rstd, weight, bias, scale, needs_scale_grad)
    d_x, d_weight, d_bias, d_scale = outputs
    rows, dim = mean.numel(), x.shape[-1]
    block_d = cover(dim)
    block_rows = rows_in_tile(block_d, BACKWARD_TILE)
    programs = num_programs(x, triton.cdiv(rows, block_rows), per_multiprocessor=4)
    partials = x.new_empty((2, programs, dim), dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad,
        x,
        mean,
        rstd,
        weight,
        bias,
        scale,
        d_x,
        d_scale,
        partials[0],
        partials[1],
        rows,
        rows // max(x.shape[0], 1),
        D=dim,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        HAS_SCALE=scale is not None,
        HAS_DSCALE=needs_scale_grad,
        num_warps=warps_for(block_d, BACKWARD_TILE),
    )
    torch.sum(partials[0], dim=0, out=d_weight)
    torch.sum(partials[1], dim=0, out=d_bias)
    return outputs


class _LayerNormAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, scale, eps):
        out, mean, rstd = layer_norm_add_forward(x, residual, weight, bias, scale, eps)
        ctx.needs_scale_grad = ctx.needs_input_grad[4]
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, weight, bias, scale = ctx.saved_tensors
        d_x, d_weight, d_bias, d_scale = layer_norm_add_backward(
            grad.contiguous(), x, mean, rstd, weight, bias, scale, ctx.needs_scale_grad
        )
        d_scale = d_scale.view(*x.shape[:-1], 1).flatten(1).sum(dim=1).to(scale.dtype) if ctx.needs_scale_grad else None
        return d_x, grad, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_scale, None


def layer_norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, branch_scale: Tensor | None
) -> Tensor:
    """Normalise and add in one pass over the rows."""
    x, residual, weight, bias = (tensor.contiguous() for tensor in (x, residual, weight, bias))
    if branch_scale is not None:
        branch_scale = branch_scale.contiguous()
    return _LayerNormAdd.apply(x, residual, weight, bias, branch_scale, eps)

"""Kernels of :mod:`mae_kernels.ops.add_layer_norm`: the mathematics and the tensors are told there.

Forward saves the sum, which is an output anyway, and each row's mean and reciprocal deviation in float32. Gradients of
weight and bias are summed by a capped number of programs, each over its own rows, and then over programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels._autocast import compute_dtype
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
    sum_ptr,  # (rows, D)
    normed_ptr,  # (rows, D)
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
    if HAS_SCALE:
        scale = tl.load(scale_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(tl.float32)
        x *= scale[:, None]
    total = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32) + x
    # What is normalised is the sum as it is stored, which is all that backward will know of it.
    total = total.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + place, total, mask=inside)
    total = total.to(tl.float32)

    normalised, mean, rstd = normalise_rows(total, inside, eps, D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(normed_ptr + place, normalised * weight[None, :] + bias[None, :], mask=inside)
    tl.store(mean_ptr + row, mean, mask=in_rows)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)


@triton.jit
def _backward_kernel(
    grad_normed_ptr,  # (rows, D)
    grad_sum_ptr,  # (rows, D), or None
    sum_ptr,  # (rows, D)
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    weight_ptr,  # (D,)
    x_ptr,  # (rows, D), or None: read for the gradient of the scale
    scale_ptr,  # (B,), or None
    d_residual_ptr,  # (rows, D)
    d_x_ptr,  # (rows, D), written if WRITE_DX
    d_scale_ptr,  # (rows,) float32, written if x is given
    d_weight_ptr,  # (programs, D) float32
    d_bias_ptr,  # (programs, D) float32
    rows,
    rows_per_sample,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_DSCALE: tl.constexpr,
    WRITE_DX: tl.constexpr,
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
        total = tl.load(sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        normalised = tl.where(inside, (total - mean[:, None]) * rstd[:, None], 0.0)
        grad = tl.load(grad_normed_ptr + place, mask=inside, other=0.0).to(tl.float32)
        d_weight += grad * normalised
        d_bias += grad
        d_total = normalise_rows_backward(grad * weight[None, :], normalised, rstd, D)
        if HAS_GRAD_SUM:
            d_total += tl.load(grad_sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_residual_ptr + place, d_total, mask=inside)
        if HAS_DSCALE:
            x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_scale_ptr + row, tl.sum(tl.where(inside, d_total * x, 0.0), axis=1), mask=in_rows)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(tl.float32)
            d_total *= scale[:, None]
        if WRITE_DX:
            tl.store(d_x_ptr + place, d_total, mask=inside)
    partial = tl.program_id(0) * D + column
    tl.store(d_weight_ptr + partial, tl.sum(d_weight, axis=0), mask=column < D)
    tl.store(d_bias_ptr + partial, tl.sum(d_bias, axis=0), mask=column < D)


def _forward_outputs(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return total, torch.empty_like(x, dtype=normed_dtype), mean, rstd


@register(outputs=_forward_outputs)
def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous ``x``, ``residual (B, ..., D)`` -> sum, normed, alike; mean and reciprocal deviation ``(rows,)``."""
    total, normed, mean, rstd = _forward_outputs(x, residual, weight, bias, scale, eps, normed_dtype)
    rows, dim = mean.numel(), x.shape[-1]
    block_d = cover(dim)
    block_rows = rows_in_tile(block_d, FORWARD_TILE)
    _forward_kernel[(triton.cdiv(rows, block_rows),)](
        x,
        residual,
        weight,
        bias,
        scale,
        total,
        normed,
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
    return total, normed, mean, rstd


def _backward_outputs(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    writes_dx = scale is not None or x_dtype != total.dtype
    d_x = total.new_empty(total.shape if writes_dx else 0, dtype=x_dtype)
    d_scale = mean.new_empty(0 if x is None else mean.shape)
    d_weight, d_bias = (weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(total), d_x, d_weight, d_bias, d_scale


@register(outputs=_backward_outputs)
def add_layer_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contiguous gradients of the outputs -> gradients of residual, x, weight, bias, and of each row's scale.

    That of ``x`` is empty where it is that of the residual, that of the scale where no ``x`` is given to find it.
    """
    outputs = _backward_outputs(grad_normed, grad_sum, total, mean, rstd, weight, x, scale, x_dtype)
    d_residual, d_x, d_weight, d_bias, d_scale = outputs
    rows, dim = mean.numel(), total.shape[-1]
    block_d = cover(dim)
    block_rows = rows_in_tile(block_d, BACKWARD_TILE)
    programs = num_programs(total, triton.cdiv(rows, block_rows), per_multiprocessor=4)
    partials = total.new_empty((2, programs, dim), dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad_normed,
        grad_sum,
        total,
        mean,
        rstd,
        weight,
        x,
        scale,
        d_residual,
        d_x,
        d_scale,
        partials[0],
        partials[1],
        rows,
        rows // max(total.shape[0], 1),
        D=dim,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        HAS_GRAD_SUM=grad_sum is not None,
        HAS_SCALE=scale is not None,
        HAS_DSCALE=x is not None,
        WRITE_DX=d_x.numel() > 0,
        num_warps=warps_for(block_d, BACKWARD_TILE),
    )
    torch.sum(partials[0], dim=0, out=d_weight)
    torch.sum(partials[1], dim=0, out=d_bias)
    return outputs


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, scale, eps, normed_dtype):
        total, normed, mean, rstd = add_layer_norm_forward(x, residual, weight, bias, scale, eps, normed_dtype)
        ctx.set_materialize_grads(False)
        ctx.x_dtype, ctx.weight_dtypes = x.dtype, (weight.dtype, bias.dtype)
        ctx.save_for_backward(total, mean, rstd, weight, x if ctx.needs_input_grad[4] else None, scale)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum, grad_normed):
        total, mean, rstd, weight, x, scale = ctx.saved_tensors
        if grad_normed is None:
            grad_normed = torch.zeros_like(total)
        if grad_sum is not None:
            grad_sum = grad_sum.contiguous()
        d_residual, d_x, d_weight, d_bias, d_scale = add_layer_norm_backward(
            grad_normed.contiguous(), grad_sum, total, mean, rstd, weight, x, scale, ctx.x_dtype
        )
        if scale is None and ctx.x_dtype == total.dtype:
            d_x = d_residual
        d_scale = None if x is None else d_scale.view(*total.shape[:-1], 1).flatten(1).sum(dim=1).to(scale.dtype)
        d_weight, d_bias = (grad.to(dtype) for grad, dtype in zip((d_weight, d_bias), ctx.weight_dtypes, strict=True))
        return d_x, d_residual, d_weight, d_bias, d_scale, None, None


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, branch_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add and normalise in one pass over the rows."""
    x, residual, weight, bias = (tensor.contiguous() for tensor in (x, residual, weight, bias))
    normed_dtype = compute_dtype(x.device.type, torch.promote_types(x.dtype, residual.dtype))
    if branch_scale is not None:
        branch_scale = branch_scale.contiguous()
    return _AddLayerNorm.apply(x, residual, weight, bias, branch_scale, eps, normed_dtype)

"""Kernels of :mod:`mae_kernels.ops.masked_mse`: the mathematics and the tensors are told there.

Forward keeps the residuals of the removed patches, compact and in the dtype of the predictions. Backward reads them
instead of predictions and image: fewer bytes in all, and the predictions of all patches need not stay in memory for it.
Residuals are not scaled before the upstream gradient is known, so that float16 does not lose them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels._targets import image_gradient
from mae_kernels.kernels._patches import grid_columns, moments, patch_constants, patch_start, value_offset
from mae_kernels.kernels._registration import cover, register
from mae_kernels.kernels._rows import FORWARD_TILE, rows_in_tile, warps_for


@triton.jit
def _forward_kernel(
    pred_ptr,  # (B * length, P)
    image_ptr,  # (B, C, H, W), any strides but a unit last one
    ids_ptr,  # (rows,) int64, of B * removed rows
    residual_ptr,  # (rows, P), written if KEEP_RESIDUAL
    slots_ptr,  # (B * length,) int32, written if KEEP_RESIDUAL
    loss_ptr,  # (programs,) float32
    rows,
    removed,
    length,
    stride_clip,
    stride_channel,
    stride_row,
    grid_columns,
    eps,
    loss_scale,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEEP_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    P: tl.constexpr = PATCH_HEIGHT * PATCH_WIDTH * CHANNELS
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    value = tl.arange(0, BLOCK_P)
    inside = (row < rows)[:, None] & (value < P)[None, :]
    row = tl.minimum(row, rows - 1)  # what lies past the end is read from the last row, and not counted
    clip = row // removed
    patch = tl.load(ids_ptr + row).to(tl.int32)
    place = clip.to(tl.int64) * length + patch

    pred = tl.load(pred_ptr + place[:, None] * P + value[None, :], mask=inside, other=0.0).to(tl.float32)
    start = patch_start(clip, patch, stride_clip, stride_row, grid_columns, STRIDE_Y, STRIDE_X)
    offset = value_offset(value, stride_channel, stride_row, PATCH_WIDTH, CHANNELS)
    target = tl.load(image_ptr + start[:, None] + offset[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        # About its first value, a patch on a large offset loses no digits and a constant one is exactly zero.
        target -= tl.load(image_ptr + start).to(tl.float32)[:, None]
        mean, squares = moments(target, inside, P)
        rstd = 1 / tl.sqrt(squares / (P - 1) + eps)
        target = (target - mean[:, None]) * rstd[:, None]
    residual = tl.where(inside, pred - target, 0.0)
    if KEEP_RESIDUAL:
        tl.store(residual_ptr + row.to(tl.int64)[:, None] * P + value[None, :], residual, mask=inside)
        tl.store(slots_ptr + place, row)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(residual * residual) * loss_scale)


@triton.jit
def _backward_kernel(
    residual_ptr,  # (B * removed, P)
    slots_ptr,  # (rows,) int32: row of residual, or -1 where visible
    grad_ptr,  # () float32
    d_pred_ptr,  # (rows, P), of B * length rows
    rows,
    scale,
    P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    value = tl.arange(0, BLOCK_P)
    in_rows = row < rows
    in_patch = (value < P)[None, :]
    slot = tl.load(slots_ptr + row, mask=in_rows, other=-1)
    residual = tl.load(
        residual_ptr + slot.to(tl.int64)[:, None] * P + value[None, :], mask=(slot >= 0)[:, None] & in_patch, other=0.0
    )
    d_pred = residual.to(tl.float32) * (tl.load(grad_ptr) * scale)
    tl.store(d_pred_ptr + row.to(tl.int64)[:, None] * P + value[None, :], d_pred, mask=in_rows[:, None] & in_patch)


def _forward_outputs(
    pred: Tensor,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: list[int],
    stride: list[int],
    normalize: bool,
    eps: float,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = pred.new_empty((), dtype=torch.float32)
    if residual_dtype is None:
        return loss, loss.new_empty(0), ids_removed.new_empty(0, dtype=torch.int32)
    residual = pred.new_empty((*ids_removed.shape, pred.shape[2]), dtype=residual_dtype)
    return loss, residual, ids_removed.new_full(pred.shape[:2], -1, dtype=torch.int32)


@register(outputs=_forward_outputs)
def masked_mse_forward(
    pred: Tensor,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: list[int],
    stride: list[int],
    normalize: bool,
    eps: float,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous ``pred (B, L, P)`` and ``ids_removed (B, R)`` -> loss; residuals ``(B, R, P)``; slots ``(B, L)``.

    Slots are the rows of the residuals in which places are found, -1 for visible ones. Without ``residual_dtype``
    residuals and slots are empty.
    """
    loss, residual, slots = _forward_outputs(
        pred, image, ids_removed, patch_size, stride, normalize, eps, residual_dtype
    )
    rows, values = ids_removed.numel(), pred.shape[2]
    block_p = cover(values)
    block_rows = rows_in_tile(block_p, FORWARD_TILE)
    programs = triton.cdiv(rows, block_rows)
    partials = loss.new_empty(programs)
    _forward_kernel[(programs,)](
        pred,
        image,
        ids_removed,
        residual,
        slots,
        partials,
        rows,
        ids_removed.shape[1],
        pred.shape[1],
        *image.stride()[:3],
        grid_columns(image, patch_size, stride),
        eps,
        1 / (rows * values),
        **patch_constants(image, patch_size, stride),
        NORMALIZE=normalize,
        KEEP_RESIDUAL=residual_dtype is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_P=block_p,
        num_warps=warps_for(block_p, FORWARD_TILE),
    )
    torch.sum(partials, dim=0, out=loss)
    return loss, residual, slots


def _backward_outputs(residual: Tensor, slots: Tensor, grad: Tensor, pred_dtype: torch.dtype) -> Tensor:
    return residual.new_empty((*slots.shape, residual.shape[2]), dtype=pred_dtype)


@register(outputs=_backward_outputs)
def masked_mse_backward(residual: Tensor, slots: Tensor, grad: Tensor, pred_dtype: torch.dtype) -> Tensor:
    """What forward kept, and the gradient of the loss -> gradient of the predictions ``(B, L, P)``."""
    d_pred = _backward_outputs(residual, slots, grad, pred_dtype)
    block_p = cover(residual.shape[2])
    block_rows = rows_in_tile(block_p, FORWARD_TILE)
    _backward_kernel[(triton.cdiv(slots.numel(), block_rows),)](
        residual,
        slots,
        grad,
        d_pred,
        slots.numel(),
        2 / residual.numel(),
        P=residual.shape[2],
        BLOCK_ROWS=block_rows,
        BLOCK_P=block_p,
        num_warps=warps_for(block_p, FORWARD_TILE),
    )
    return d_pred


class _MaskedMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, image, ids_removed, sizes, residual_dtype):
        loss, residual, slots = masked_mse_forward(pred, image, ids_removed, *sizes, residual_dtype)
        ctx.sizes, ctx.pred_dtype = sizes, pred.dtype
        ctx.save_for_backward(residual, slots, *((image, ids_removed) if ctx.needs_input_grad[1] else (None, None)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        residual, slots, image, ids_removed = ctx.saved_tensors
        d_pred = masked_mse_backward(residual, slots, grad, ctx.pred_dtype) if ctx.needs_input_grad[0] else None
        d_image = None
        if image is not None:
            d_target = residual * (grad * (-2 / residual.numel()))
            d_image = image_gradient(d_target, image, ids_removed, *ctx.sizes)
        return d_pred, d_image, None, None, None


def masked_mse(
    pred: Tensor,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    """Score the removed patches in one pass over them."""
    residual_dtype = None
    if torch.is_grad_enabled() and (pred.requires_grad or image.requires_grad):
        # Their mean, which normalisation takes out of the image's gradient, must not leave its rounding errors there.
        residual_dtype = torch.float32 if image.requires_grad else pred.dtype
    if image.stride(3) != 1:
        image = image.contiguous()
    sizes = (patch_size, stride, normalize, eps)
    return _MaskedMSE.apply(pred.contiguous(), image, ids_removed.contiguous(), sizes, residual_dtype)

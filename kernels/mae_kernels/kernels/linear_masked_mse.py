"""Kernels of :mod:`mae_kernels.ops.linear_masked_mse`: the mathematics and the tensors are told there.

Forward multiplies the removed rows of ``hidden``, found by their ids, and turns each tile of predictions into residuals
``E (R, P)``, the one thing that it writes besides sums. The gradients are linear in them:

.. math:: dW \\propto E^\\top H, \\qquad d\\beta \\propto \\mathbf{1}^\\top E, \\qquad dH \\propto E W

The first two are taken at once and are small, so that ``hidden`` need not be kept; the third waits for the upstream
gradient, since keeping ``E`` is cheaper than keeping ``dH``, P values a removed row for D a row of ``hidden``, and than
scaling it afterwards, which would read and write it once more. Residuals are not scaled before, so that float16 does
not lose them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels._autocast import compute_dtype
from mae_kernels._targets import image_gradient
from mae_kernels.kernels._patches import grid_columns, moments, patch_constants, patch_start, value_offset
from mae_kernels.kernels._registration import cover, dot_precision, num_programs, operand_dtype, register

# Bytes of a row in a tile of operands, and warps that share the weight's gradient.
_DEPTH_BYTES, _WARPS_PER_MULTIPROCESSOR = 128, 16


def _tile(dtype: torch.dtype) -> tuple[int, int]:
    """Side of a square tile of products of ``dtype``, and its warps. Those of float32 do without tensor cores."""
    return (128, 8) if dtype.itemsize == 2 else (64, 4)


@triton.jit
def _forward_kernel(
    hidden_ptr,  # (B, length, D), any strides but a unit last one
    weight_ptr,  # (P, D)
    bias_ptr,  # (P,), or None
    image_ptr,  # (B, C, H, W), any strides but a unit last one
    ids_ptr,  # (rows,) int64, of B * removed rows
    residual_ptr,  # (rows, P), written if KEEP_RESIDUAL
    slots_ptr,  # (B * length,) int32, written if KEEP_RESIDUAL
    sums_ptr,  # (programs, P) float32, written if KEEP_RESIDUAL
    loss_ptr,  # (programs,) float32
    rows,
    removed,
    length,
    stride_hidden_clip,
    stride_hidden_row,
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
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    P: tl.constexpr = PATCH_HEIGHT * PATCH_WIDTH * CHANNELS
    tile_row = tl.arange(0, BLOCK_ROWS)
    row = tl.program_id(0) * BLOCK_ROWS + tile_row
    in_rows = row < rows
    row = tl.minimum(row, rows - 1)  # what lies past the end is read from the last row, and not counted
    clip = row // removed
    patch = tl.load(ids_ptr + row).to(tl.int32)
    start = patch_start(clip, patch, stride_clip, stride_row, grid_columns, STRIDE_Y, STRIDE_X)
    hidden_row = hidden_ptr + (clip.to(tl.int64) * stride_hidden_clip + patch * stride_hidden_row)[:, None]

    if NORMALIZE:
        # Moments of a patch, tile by tile (Chan et al. 1979); about its first value, as in masked_mse.
        first = tl.load(image_ptr + start).to(tl.float32)
        mean = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        squares = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        for seen in range(0, P, BLOCK_P):
            value = seen + tl.arange(0, BLOCK_P)
            in_patch = (value < P)[None, :]
            offset = value_offset(value, stride_channel, stride_row, PATCH_WIDTH, CHANNELS)
            x = tl.load(image_ptr + start[:, None] + offset[None, :], mask=in_patch, other=0.0).to(tl.float32)
            count = tl.minimum(P - seen, BLOCK_P)
            tile_mean, tile_squares = moments(x - first[:, None], in_patch, count)
            step = tile_mean - mean
            mean += step * (count / (seen + count))
            squares += tile_squares + step * step * (seen * (count / (seen + count)))
        mean += first
        rstd = 1 / tl.sqrt(squares / (P - 1) + eps)

    loss = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for first_value in range(0, P, BLOCK_P):
        value = first_value + tl.arange(0, BLOCK_P)
        in_patch = (value < P)[None, :]
        offset = value_offset(value, stride_channel, stride_row, PATCH_WIDTH, CHANNELS)
        x = tl.load(image_ptr + start[:, None] + offset[None, :], mask=in_patch, other=0.0).to(tl.float32)
        # The product is added to the negative target, so that only one tile lives beside its operands.
        if NORMALIZE:
            residual = (mean[:, None] - x) * rstd[:, None]
        else:
            residual = -x
        if HAS_BIAS:
            residual += tl.load(bias_ptr + value, mask=value < P, other=0.0).to(tl.float32)[None, :]
        weight_row = weight_ptr + value[:, None] * D
        for first_column in range(0, D, BLOCK_D):
            column = first_column + tl.arange(0, BLOCK_D)
            in_columns = (column < D)[None, :]
            hidden = tl.load(hidden_row + column[None, :], mask=in_columns, other=0.0)
            weight = tl.load(weight_row + column[None, :], mask=(value < P)[:, None] & in_columns, other=0.0)
            residual = tl.dot(hidden.to(PRODUCT), weight.to(PRODUCT).T, residual, input_precision=PRECISION)
        inside = in_rows[:, None] & in_patch
        residual = tl.where(inside, residual, 0.0)
        loss += tl.sum(residual * residual, axis=1)
        if KEEP_RESIDUAL:
            place = tl.program_id(0).to(tl.int64) * (BLOCK_ROWS * P) + (tile_row[:, None] * P + value[None, :])
            tl.store(residual_ptr + place, residual, mask=inside)
            tl.store(sums_ptr + tl.program_id(0) * P + value, tl.sum(residual, axis=0), mask=value < P)
    if KEEP_RESIDUAL:
        tl.store(slots_ptr + clip.to(tl.int64) * length + patch, row)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(loss) * loss_scale)


@triton.jit
def _weight_gradient_kernel(
    residual_ptr,  # (rows, P), of B * removed rows
    hidden_ptr,  # (B, length, D), any strides but a unit last one
    ids_ptr,  # (rows,) int64
    d_weight_ptr,  # (shares, P, D) float32
    rows,
    removed,
    stride_hidden_clip,
    stride_hidden_row,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    value = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_values, in_columns = value < P, column < D
    d_weight = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for block in range(tl.program_id(2), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(2)):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = row < rows
        patch = tl.load(ids_ptr + row, mask=in_rows, other=0).to(tl.int32)
        hidden_row = (row // removed).to(tl.int64) * stride_hidden_clip + patch * stride_hidden_row
        residual = tl.load(
            residual_ptr + row.to(tl.int64)[:, None] * P + value[None, :],
            mask=in_rows[:, None] & in_values[None, :],
            other=0.0,
        )
        hidden = tl.load(
            hidden_ptr + hidden_row[:, None] + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0
        )
        d_weight = tl.dot(residual.to(PRODUCT).T, hidden.to(PRODUCT), d_weight, input_precision=PRECISION)
    partial = d_weight_ptr + tl.program_id(2).to(tl.int64) * P * D
    tl.store(partial + value[:, None] * D + column[None, :], d_weight, mask=in_values[:, None] & in_columns[None, :])


@triton.jit
def _hidden_gradient_kernel(
    residual_ptr,  # (B * removed, P)
    slots_ptr,  # (rows,) int32: row of residual, or -1 where visible
    weight_ptr,  # (P, D)
    scale_ptr,  # () float32
    d_hidden_ptr,  # (rows, D), of B * length rows
    rows,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs of the same rows follow each other, so that the residuals that they share stay in the cache.
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    column = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0) // column_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows, in_columns = row < rows, column < D
    slot = tl.load(slots_ptr + row, mask=in_rows, other=-1)
    residual_row = residual_ptr + slot.to(tl.int64)[:, None] * P
    d_hidden = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    for first_value in range(0, P, BLOCK_P):
        value = first_value + tl.arange(0, BLOCK_P)
        in_values = value < P
        residual = tl.load(residual_row + value[None, :], mask=(slot >= 0)[:, None] & in_values[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + value[:, None] * D + column[None, :], mask=in_values[:, None] & in_columns[None, :], other=0.0
        )
        d_hidden = tl.dot(residual.to(PRODUCT), weight.to(PRODUCT), d_hidden, input_precision=PRECISION)
    d_hidden *= tl.load(scale_ptr)
    tl.store(
        d_hidden_ptr + row.to(tl.int64)[:, None] * D + column[None, :],
        d_hidden,
        mask=in_rows[:, None] & in_columns[None, :],
    )


def _forward_outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: list[int],
    stride: list[int],
    normalize: bool,
    eps: float,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    if residual_dtype is None:
        return loss, loss.new_empty(0), ids_removed.new_empty(0, dtype=torch.int32), loss.new_empty(0)
    residual = hidden.new_empty((*ids_removed.shape, weight.shape[0]), dtype=residual_dtype)
    slots = ids_removed.new_full(hidden.shape[:2], -1, dtype=torch.int32)
    return loss, residual, slots, loss.new_empty(weight.shape[0])


@register(outputs=_forward_outputs)
def linear_masked_mse_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: list[int],
    stride: list[int],
    normalize: bool,
    eps: float,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``hidden (B, L, D)``, rounded to the dtype of ``weight (P, D)`` -> loss; residuals, slots, residual sums.

    Residuals are ``(B, R, P)``; slots ``(B, L)`` are the rows of them in which places are found, -1 for visible ones;
    sums, over all rows, are ``(P,)``. Without ``residual_dtype`` the three are empty.
    """
    loss, residual, slots, sums = _forward_outputs(
        hidden, weight, bias, image, ids_removed, patch_size, stride, normalize, eps, residual_dtype
    )
    rows, (values, dim) = ids_removed.numel(), weight.shape
    keeps = residual_dtype is not None
    side, warps = _tile(weight.dtype)
    block_p = min(cover(values, least=16), side)
    if keeps and weight.element_size() == 2 and block_p < values <= 2 * side:
        block_p, warps = 2 * side, 2 * warps  # the whole patch, which then is read once
    programs = triton.cdiv(rows, side)
    partials = loss.new_empty(programs)
    partial_sums = loss.new_empty((programs if keeps else 0, values))
    _forward_kernel[(programs,)](
        hidden,
        weight,
        bias,
        image,
        ids_removed,
        residual,
        slots,
        partial_sums,
        partials,
        rows,
        ids_removed.shape[1],
        hidden.shape[1],
        *hidden.stride()[:2],
        *image.stride()[:3],
        grid_columns(image, patch_size, stride),
        eps,
        1 / (rows * values),
        **patch_constants(image, patch_size, stride),
        D=dim,
        NORMALIZE=normalize,
        HAS_BIAS=bias is not None,
        KEEP_RESIDUAL=keeps,
        BLOCK_ROWS=side,
        BLOCK_P=block_p,
        BLOCK_D=min(cover(dim, least=16), _DEPTH_BYTES // hidden.element_size()),
        PRODUCT=operand_dtype(weight.dtype),
        PRECISION=dot_precision(weight),
        num_warps=warps,
    )
    torch.sum(partials, dim=0, out=loss)
    if keeps:
        torch.sum(partial_sums, dim=0, out=sums)
    return loss, residual, slots, sums


def _weight_gradient_outputs(residual: Tensor, hidden: Tensor, ids_removed: Tensor, dtype: torch.dtype) -> Tensor:
    return residual.new_empty((residual.shape[2], hidden.shape[2]), dtype=torch.float32)


@register(outputs=_weight_gradient_outputs)
def linear_masked_mse_weight_gradient(
    residual: Tensor, hidden: Tensor, ids_removed: Tensor, dtype: torch.dtype
) -> Tensor:
    """Residuals ``(B, R, P)`` and the removed rows of ``hidden``, rounded to ``dtype`` -> ``(P, D)`` float32."""
    d_weight = _weight_gradient_outputs(residual, hidden, ids_removed, dtype)
    rows, (values, dim) = ids_removed.numel(), d_weight.shape
    side, warps = _tile(dtype)
    block_p, block_d = (min(cover(size, least=16), side) for size in (values, dim))
    tiles = (triton.cdiv(values, block_p), triton.cdiv(dim, block_d))
    block_rows = _DEPTH_BYTES // hidden.element_size()
    shares = num_programs(
        residual, triton.cdiv(rows, block_rows), per_multiprocessor=_WARPS_PER_MULTIPROCESSOR // warps
    )
    partials = d_weight.new_empty((max(shares // (tiles[0] * tiles[1]), 1), *d_weight.shape))
    _weight_gradient_kernel[(*tiles, partials.shape[0])](
        residual,
        hidden,
        ids_removed,
        partials,
        rows,
        ids_removed.shape[1],
        *hidden.stride()[:2],
        P=values,
        D=dim,
        BLOCK_ROWS=block_rows,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        PRODUCT=operand_dtype(dtype),
        PRECISION=dot_precision(residual),
        num_warps=warps,
    )
    torch.sum(partials, dim=0, out=d_weight)
    return d_weight


def _hidden_gradient_outputs(
    residual: Tensor, slots: Tensor, weight: Tensor, scale: Tensor, hidden_dtype: torch.dtype
) -> Tensor:
    return residual.new_empty((*slots.shape, weight.shape[1]), dtype=hidden_dtype)


@register(outputs=_hidden_gradient_outputs)
def linear_masked_mse_hidden_gradient(
    residual: Tensor, slots: Tensor, weight: Tensor, scale: Tensor, hidden_dtype: torch.dtype
) -> Tensor:
    """What forward kept, the weight and the residuals' factor, () float32 -> gradient of ``hidden (B, L, D)``."""
    d_hidden = _hidden_gradient_outputs(residual, slots, weight, scale, hidden_dtype)
    values, dim = weight.shape
    side, warps = _tile(weight.dtype)
    block_d = min(cover(dim, least=16), side)
    _hidden_gradient_kernel[(triton.cdiv(dim, block_d) * triton.cdiv(slots.numel(), side),)](
        residual,
        slots,
        weight,
        scale,
        d_hidden,
        slots.numel(),
        P=values,
        D=dim,
        BLOCK_ROWS=side,
        BLOCK_D=block_d,
        BLOCK_P=min(cover(values, least=16), _DEPTH_BYTES // residual.element_size()),
        PRODUCT=operand_dtype(weight.dtype),
        PRECISION=dot_precision(weight),
        num_warps=warps,
    )
    return d_hidden


class _LinearMaskedMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, image, ids_removed, sizes, product_dtype, residual_dtype):
        ctx.sizes, ctx.dtypes = sizes, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.scale = 2 / (ids_removed.numel() * weight.shape[0])
        weight, bias = (None if t is None else t.to(product_dtype).contiguous() for t in (weight, bias))
        loss, residual, slots, sums = linear_masked_mse_forward(
            hidden, weight, bias, image, ids_removed, *sizes, residual_dtype
        )
        hidden_grad, weight_grad, _, image_grad, *_ = ctx.needs_input_grad
        d_weight = None
        if weight_grad and residual_dtype is not None:
            d_weight = linear_masked_mse_weight_gradient(residual, hidden, ids_removed, product_dtype)
        ctx.save_for_backward(
            residual if hidden_grad or image_grad else None,
            *((slots, weight) if hidden_grad else (None, None)),
            *((image, ids_removed) if image_grad else (None, None)),
            d_weight,
            sums,
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        residual, slots, weight, image, ids_removed, d_weight, d_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        scale = grad * ctx.scale
        d_hidden = d_image = None
        if weight is not None:
            d_hidden = linear_masked_mse_hidden_gradient(residual, slots, weight, scale, hidden_dtype)
        if d_weight is not None:
            d_weight = (d_weight * scale).to(weight_dtype)
        d_bias = (d_bias * scale).to(bias_dtype) if ctx.needs_input_grad[2] else None
        if image is not None:
            d_image = image_gradient(residual * -scale, image, ids_removed, *ctx.sizes)
        return d_hidden, d_weight, d_bias, d_image, None, None, None, None


def linear_masked_mse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    """Predict and score the removed patches in one pass over them."""
    product_dtype, residual_dtype = compute_dtype(hidden.device.type, hidden.dtype), None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias, image)):
        # Their mean, which normalisation takes out of the image's gradient, must not leave its rounding errors there.
        residual_dtype = torch.float32 if image.requires_grad else product_dtype
    hidden, image = (t if t.stride(-1) == 1 else t.contiguous() for t in (hidden, image))
    sizes = (patch_size, stride, normalize, eps)
    return _LinearMaskedMSE.apply(
        hidden, weight, bias, image, ids_removed.contiguous(), sizes, product_dtype, residual_dtype
    )

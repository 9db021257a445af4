"""Kernels of :mod:`mae_kernels.ops.patch_embed`: the mathematics and the tensors are told there.

Both kernels read patches from the image itself, by index arithmetic: what the formula has as a matrix of patches
``(B K, P)`` exists only as tiles. A program of the forward kernel takes a block of rows through all of ``D``, so that
a patch is read once where a tile holds it whole. A program of the backward kernel sums a tile of the weight's gradient
over its share of the rows; shares are then added.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels._autocast import compute_dtype
from mae_kernels.kernels._patches import patch_start
from mae_kernels.kernels._registration import cover, dot_precision, num_programs, operand_dtype, register
from mae_kernels.patches import grid_shape, scatter_patches


@triton.jit
def _load_patches(
    image_ptr,  # (B, C, H, W), any strides but a unit last one
    start,  # (rows,) int64: offsets of the patches' first values
    in_rows,  # (rows,) bool
    value,  # (BLOCK_P,): which of a patch's values, in the order of the weight: channel, row, column
    stride_channel,
    stride_row,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    P: tl.constexpr,
):
    """Values of patches, (rows, BLOCK_P), zero outside."""
    # The sizes are constants so that Triton can prove rows of a patch to be contiguous.
    channel = value // (PATCH_HEIGHT * PATCH_WIDTH)
    y = value // PATCH_WIDTH % PATCH_HEIGHT
    offset = channel * stride_channel + y * stride_row + value % PATCH_WIDTH
    inside = in_rows[:, None] & (value < P)[None, :]
    return tl.load(image_ptr + start[:, None] + offset[None, :], mask=inside, other=0.0)


@triton.jit
def _load_weight(weight_ptr, column, value, D: tl.constexpr, P: tl.constexpr):
    """Rows of the weight, (BLOCK_D, BLOCK_P), zero outside."""
    inside = (column < D)[:, None] & (value < P)[None, :]
    return tl.load(weight_ptr + column[:, None] * P + value[None, :], mask=inside, other=0.0)


@triton.jit
def _forward_kernel(
    image_ptr,  # (B, C, H, W), any strides but a unit last one
    ids_ptr,  # (B, kept) int64
    weight_ptr,  # (D, P), in the dtype of the product
    bias_ptr,  # (D,), or None
    position_ptr,  # (HAS_CLS_POSITION + L, D), or None
    cls_ptr,  # (D,), or None
    tokens_ptr,  # (B, HAS_CLS + kept, D)
    rows,
    kept,
    stride_clip,
    stride_channel,
    stride_row,
    grid_columns,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HOLD_PATCHES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_CLS: tl.constexpr,
    HAS_CLS_POSITION: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < rows
    clip = row // (HAS_CLS + kept)
    place = row % (HAS_CLS + kept) - HAS_CLS  # -1 is the class token
    is_patch = in_rows & (place >= 0)
    patch = tl.load(ids_ptr + clip * kept + place, mask=is_patch, other=0).to(tl.int32)
    start = patch_start(clip, patch, stride_clip, stride_row, grid_columns, STRIDE_Y, STRIDE_X)
    position_row = tl.where(is_patch, patch + HAS_CLS_POSITION, 0)
    has_position = in_rows if HAS_CLS_POSITION else is_patch

    value = tl.arange(0, BLOCK_P)
    patches: tl.tuple = ()
    if HOLD_PATCHES:
        for first in tl.static_range(0, P, BLOCK_P):
            chunk = _load_patches(
                image_ptr, start, is_patch, first + value, stride_channel, stride_row, PATCH_HEIGHT, PATCH_WIDTH, P
            )
            patches += (chunk.to(PRODUCT),)
    tokens_ptr += tl.program_id(0).to(tl.int64) * BLOCK_ROWS * D
    for first_column in range(tl.program_id(1) * BLOCK_D, D, tl.num_programs(1) * BLOCK_D):
        column = first_column + tl.arange(0, BLOCK_D)
        # The product is taken transposed: its first operand is then the weight, which tensor cores of sm_90 read from
        # shared memory. Patches, having been rounded in registers, would stay there, and take the room of a program.
        tokens = tl.zeros((BLOCK_D, BLOCK_ROWS), dtype=tl.float32)
        if HOLD_PATCHES:
            for i in tl.static_range(len(patches)):
                weight = _load_weight(weight_ptr, column, i * BLOCK_P + value, D, P).to(PRODUCT)
                tokens = tl.dot(weight, patches[i].T, tokens, input_precision=PRECISION)
        else:
            for first in range(0, P, BLOCK_P):
                chunk = _load_patches(
                    image_ptr, start, is_patch, first + value, stride_channel, stride_row, PATCH_HEIGHT, PATCH_WIDTH, P
                )
                weight = _load_weight(weight_ptr, column, first + value, D, P).to(PRODUCT)
                tokens = tl.dot(weight, chunk.to(PRODUCT).T, tokens, input_precision=PRECISION)
        tokens = tokens.T

        in_columns = column < D
        if HAS_BIAS:
            tokens += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if HAS_CLS:
            cls = tl.load(cls_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
            tokens = tl.where(is_patch[:, None], tokens, cls[None, :])
        if HAS_POSITION:
            tokens += tl.load(
                position_ptr + position_row[:, None] * D + column[None, :],
                mask=has_position[:, None] & in_columns[None, :],
                other=0.0,
            ).to(tl.float32)
        inside = in_rows[:, None] & in_columns[None, :]
        tl.store(tokens_ptr + tl.arange(0, BLOCK_ROWS)[:, None] * D + column[None, :], tokens, mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr,  # (B, HAS_CLS + kept, D)
    image_ptr,  # (B, C, H, W), any strides but a unit last one
    ids_ptr,  # (rows,) int64, of B * kept rows
    d_weight_ptr,  # (shares, D, P) float32
    d_bias_ptr,  # (shares, D) float32, written if HAS_BIAS
    rows,
    kept,
    stride_clip,
    stride_channel,
    stride_row,
    grid_columns,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    share = tl.program_id(2)
    in_columns = column < D
    d_weight = tl.zeros((BLOCK_D, BLOCK_P), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    for block in range(share, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(2)):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = row < rows
        clip = row // kept
        patch = tl.load(ids_ptr + row, mask=in_rows, other=0).to(tl.int32)
        start = patch_start(clip, patch, stride_clip, stride_row, grid_columns, STRIDE_Y, STRIDE_X)
        patches = _load_patches(
            image_ptr, start, in_rows, value, stride_channel, stride_row, PATCH_HEIGHT, PATCH_WIDTH, P
        )
        token_row = row + (clip + 1) * HAS_CLS
        grad = tl.load(
            grad_ptr + token_row.to(tl.int64)[:, None] * D + column[None, :],
            mask=in_rows[:, None] & in_columns[None, :],
            other=0.0,
        )
        d_weight = tl.dot(grad.to(PRODUCT).T, patches.to(PRODUCT), d_weight, input_precision=PRECISION)
        if HAS_BIAS:
            d_bias += grad.to(tl.float32)
    inside = in_columns[:, None] & (value < P)[None, :]
    tl.store(d_weight_ptr + (share * D + column)[:, None].to(tl.int64) * P + value[None, :], d_weight, mask=inside)
    if HAS_BIAS:
        tl.store(d_bias_ptr + share * D + column, tl.sum(d_bias, axis=0), mask=in_columns & (tl.program_id(1) == 0))


class _Tile(NamedTuple):
    """What a program of a kernel works on at a time, and with how much."""

    rows: int  # of tokens
    dim: int  # values of a token
    values: int  # of a patch
    warps: int
    stages: int
    per_multiprocessor: int  # programs that run at once


# A larger tile would read the weight less often from the L2 cache, but registers and shared memory suffice for four
# programs of this one, of which some compute while others store.
_HELD_FORWARD = _Tile(rows=64, dim=64, values=64, warps=4, stages=1, per_multiprocessor=4)
_STREAMED_FORWARD = _Tile(rows=64, dim=128, values=64, warps=8, stages=2, per_multiprocessor=1)

# As few rows as a product takes, so that two stages of loads, 24 KiB each, fit the 64 KiB that every device has.
_BACKWARD = _Tile(rows=16, dim=128, values=256, warps=8, stages=5, per_multiprocessor=1)

# Products of float32 are no work for tensor cores; registers bound the tile.
_FLOAT32_FORWARD = _Tile(rows=64, dim=64, values=32, warps=4, stages=1, per_multiprocessor=3)
_FLOAT32_BACKWARD = _Tile(rows=16, dim=64, values=64, warps=4, stages=2, per_multiprocessor=4)

# The largest patch that a block of rows is held of, in shared memory: 32 KiB.
_HELD_VALUES = 256


def _patch_constants(weight_shape: Sequence[int], stride: Sequence[int]) -> dict[str, int]:
    dim, channels, height, width = weight_shape
    return {
        "PATCH_HEIGHT": height,
        "PATCH_WIDTH": width,
        "STRIDE_Y": stride[0],
        "STRIDE_X": stride[1],
        "D": dim,
        "P": channels * height * width,
    }


def _image_grid(image: Tensor, weight_shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    return grid_shape((image.shape[2], image.shape[3]), (weight_shape[2], weight_shape[3]), (stride[0], stride[1]))


def _forward_outputs(
    image: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    cls_token: Tensor | None,
    stride: list[int],
    dtype: torch.dtype,
) -> Tensor:
    batch, kept = ids_keep.shape
    return image.new_empty((batch, int(cls_token is not None) + kept, weight.shape[0]), dtype=dtype)


@register(outputs=_forward_outputs)
def patch_embed_forward(
    image: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    cls_token: Tensor | None,
    stride: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Tensors of the operator, contiguous but for the image's leading axes -> tokens ``(B, [1 +] K, D)`` of ``dtype``.

    The product is taken in the dtype of the weight.
    """
    tokens = _forward_outputs(image, ids_keep, weight, bias, position, cls_token, stride, dtype)
    rows, dim = tokens.shape[0] * tokens.shape[1], tokens.shape[2]
    grid_rows, grid_columns = _image_grid(image, weight.shape, stride)
    values = weight.shape[1:].numel()
    holds = weight.dtype != torch.float32 and values <= _HELD_VALUES
    tile = _FLOAT32_FORWARD if weight.dtype == torch.float32 else _HELD_FORWARD if holds else _STREAMED_FORWARD
    blocks, columns = triton.cdiv(rows, tile.rows), triton.cdiv(dim, tile.dim)
    # Where rows are few, several programs share a block of them and split D.
    programs = num_programs(image, blocks * columns, per_multiprocessor=tile.per_multiprocessor)
    _forward_kernel[(blocks, max(programs // max(blocks, 1), 1))](
        image,
        ids_keep,
        weight,
        bias,
        position,
        cls_token,
        tokens,
        rows,
        ids_keep.shape[1],
        *image.stride()[:3],
        grid_columns,
        **_patch_constants(weight.shape, stride),
        BLOCK_ROWS=tile.rows,
        BLOCK_D=tile.dim,
        BLOCK_P=min(tile.values, cover(values, least=16)),
        HOLD_PATCHES=holds,
        HAS_BIAS=bias is not None,
        HAS_POSITION=position is not None,
        HAS_CLS=cls_token is not None,
        HAS_CLS_POSITION=position is not None and position.shape[0] > grid_rows * grid_columns,
        PRODUCT=operand_dtype(weight.dtype),
        PRECISION=dot_precision(weight),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return tokens


def _backward_outputs(
    grad: Tensor,
    image: Tensor,
    ids_keep: Tensor,
    weight_shape: list[int],
    has_bias: bool,
    stride: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    d_weight = grad.new_empty(weight_shape, dtype=torch.float32)
    return d_weight, grad.new_empty(weight_shape[0] if has_bias else 0, dtype=torch.float32)


@register(outputs=_backward_outputs)
def patch_embed_backward(
    grad: Tensor,
    image: Tensor,
    ids_keep: Tensor,
    weight_shape: list[int],
    has_bias: bool,
    stride: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Contiguous gradient of the tokens -> gradients of the weight and of the bias, empty where it has none.

    The product is taken in ``dtype``.
    """
    d_weight, d_bias = _backward_outputs(grad, image, ids_keep, weight_shape, has_bias, stride, dtype)
    dim, values, rows = weight_shape[0], d_weight.shape[1:].numel(), ids_keep.numel()
    tile = _FLOAT32_BACKWARD if dtype == torch.float32 else _BACKWARD
    block_p = min(tile.values, cover(values, least=16))
    tiles = triton.cdiv(dim, tile.dim), triton.cdiv(values, block_p)
    blocks = triton.cdiv(rows, tile.rows)
    programs = num_programs(grad, tiles[0] * tiles[1] * blocks, per_multiprocessor=tile.per_multiprocessor)
    shares = min(max(programs // (tiles[0] * tiles[1]), 1), blocks)
    partials = grad.new_empty((shares, *weight_shape), dtype=torch.float32)
    bias_partials = grad.new_empty((shares, d_bias.numel()), dtype=torch.float32)
    _backward_kernel[(*tiles, shares)](
        grad,
        image,
        ids_keep,
        partials,
        bias_partials,
        rows,
        ids_keep.shape[1],
        *image.stride()[:3],
        _image_grid(image, weight_shape, stride)[1],
        **_patch_constants(weight_shape, stride),
        BLOCK_ROWS=tile.rows,
        BLOCK_D=tile.dim,
        BLOCK_P=block_p,
        HAS_BIAS=has_bias,
        HAS_CLS=grad.shape[1] > ids_keep.shape[1],
        PRODUCT=operand_dtype(dtype),
        PRECISION=dot_precision(grad),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    torch.sum(partials, dim=0, out=d_weight)
    torch.sum(bias_partials, dim=0, out=d_bias)
    return d_weight, d_bias


def _image_gradient(grad: Tensor, image: Tensor, ids_keep: Tensor, weight: Tensor, stride: list[int]) -> Tensor:
    """Gradient ``(B, C, H, W)`` in float32 for that of the patches' tokens ``(B, K, D)``, by a product of its dtype."""
    patches = (grad @ weight.flatten(1).to(grad.dtype)).to(torch.float32).unflatten(2, weight.shape[1:])
    return scatter_patches(patches, ids_keep, (image.shape[2], image.shape[3]), (stride[0], stride[1]))


def _position_gradient(grad: Tensor, ids_keep: Tensor, position: Tensor, has_cls_position: bool) -> Tensor:
    """Gradient ``([1 +] L, D)`` in float32 for that of all tokens ``(B, [1 +] K, D)``."""
    places = F.pad(ids_keep + 1, (1, 0)) if has_cls_position else ids_keep
    grad = grad[:, grad.shape[1] - places.shape[1] :].to(torch.float32)
    return torch.zeros_like(position, dtype=torch.float32).index_put((places,), grad, accumulate=True)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, image, ids_keep, weight, bias, position, cls_token, stride, has_cls_position, product_dtype, dtype
    ):
        # Whatever has a shape that backward needs is saved whole: sizes by themselves would not pass torch.compile
        # where they are symbolic, and all but the image are parameters.
        reads_image = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        ctx.save_for_backward(image if reads_image else None, ids_keep, weight, bias, position, cls_token)
        ctx.stride, ctx.has_cls_position, ctx.product_dtype = stride, has_cls_position, product_dtype
        weight = weight.to(product_dtype)
        return patch_embed_forward(image, ids_keep, weight, bias, position, cls_token, stride, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        image, ids_keep, weight, bias, position, cls_token = ctx.saved_tensors
        needs_image, _, needs_weight, needs_bias, needs_position, needs_cls, *_ = ctx.needs_input_grad
        d_image = d_weight = d_bias = d_position = d_cls = None
        d_patches = grad[:, grad.shape[1] - ids_keep.shape[1] :]
        if needs_weight:
            d_weight, sums = patch_embed_backward(
                grad.contiguous(), image, ids_keep, weight.shape, needs_bias, ctx.stride, ctx.product_dtype
            )
            d_weight = d_weight.to(weight.dtype)
        elif needs_bias:
            sums = d_patches.sum(dim=(0, 1), dtype=torch.float32)
        if needs_bias:
            d_bias = sums.to(bias.dtype)
        if needs_image:
            d_image = _image_gradient(d_patches.to(ctx.product_dtype), image, ids_keep, weight, ctx.stride)
            d_image = d_image.to(image.dtype)
        if needs_position:
            d_position = _position_gradient(grad, ids_keep, position, ctx.has_cls_position).to(position.dtype)
        if needs_cls:
            d_cls = grad[:, 0].sum(dim=0, dtype=torch.float32).view(cls_token.shape).to(cls_token.dtype)
        return d_image, None, d_weight, d_bias, d_position, d_cls, None, None, None, None


def patch_embed(
    image: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    cls_token: Tensor | None,
    stride: tuple[int, int],
) -> Tensor:
    """Read the visible patches where they are, and write their tokens once."""
    product_dtype = dtype = compute_dtype(image.device.type, image.dtype)
    for added in (position, cls_token):
        if added is not None:
            dtype = torch.promote_types(dtype, added.dtype)
    rows, columns = _image_grid(image, weight.shape, stride)
    has_cls_position = position is not None and position.shape[0] > rows * columns
    if image.stride(3) != 1:
        image = image.contiguous()
    ids_keep, weight = ids_keep.contiguous(), weight.contiguous()
    bias, position, cls_token = (None if t is None else t.contiguous() for t in (bias, position, cls_token))
    return _PatchEmbed.apply(
        image, ids_keep, weight, bias, position, cls_token, list(stride), has_cls_position, product_dtype, dtype
    )

"""Kernels of :mod:`mae_kernels.ops.restore_tokens`: the mathematics and the tensors are told there.

A program takes a block of places and goes through clips with it. Forward reads the positions of these places once and
keeps them, and mask token plus position, in registers; backward sums the mask token's gradient there. Both go over
places, not over tokens, so that what is large, the restored side, is read or written in order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels.kernels._registration import cover, num_programs, register

# Values of a tile, and how many of them lie along a row: wider rows are cut, so that one of 768 values does not leave a
# quarter of the lanes idle as a block of 1024 would.
_TILE, _COLUMNS = 2048, 256

# Warps of a program, and programs that a multiprocessor runs at once, for which registers just suffice.
_WARPS, _PER_MULTIPROCESSOR = 4, 8


@triton.jit
def _forward_kernel(
    tokens_ptr,  # (B, HAS_CLS + visible, D)
    ids_ptr,  # (B, length) int64
    mask_token_ptr,  # (D,)
    position_ptr,  # (HAS_CLS_POSITION + length, D), or None
    restored_ptr,  # (B, KEEP_CLS + length, D)
    batch,
    visible,
    length,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_CLS: tl.constexpr,
    KEEP_CLS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_CLS_POSITION: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) - KEEP_CLS  # -1 is the class token
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_places = place < length
    in_columns = column < D
    inside = in_places[:, None] & in_columns[None, :]

    fill = tl.load(mask_token_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if HAS_POSITION:
        position_row = place + HAS_CLS_POSITION
        position = tl.load(
            position_ptr + position_row.to(tl.int64)[:, None] * D + column[None, :],
            mask=inside & (position_row >= 0)[:, None],
            other=0.0,
        ).to(tl.float32)
        fill += position
    for clip in range(tl.program_id(2), batch, tl.num_programs(2)):
        source = tl.load(ids_ptr + clip * length + place, mask=in_places & (place >= 0), other=-1).to(tl.int32)
        is_visible = source < visible
        token_row = clip * (HAS_CLS + visible) + HAS_CLS + source
        token = tl.load(
            tokens_ptr + token_row.to(tl.int64)[:, None] * D + column[None, :],
            mask=inside & is_visible[:, None],
            other=0.0,
        ).to(tl.float32)
        if HAS_POSITION:
            token += position
        restored = tl.where(is_visible[:, None], token, fill)
        restored_row = clip * (KEEP_CLS + length) + KEEP_CLS + place
        tl.store(restored_ptr + restored_row.to(tl.int64)[:, None] * D + column[None, :], restored, mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr,  # (B, KEEP_CLS + length, D)
    ids_ptr,  # (B, length) int64
    d_tokens_ptr,  # (B, HAS_CLS + visible, D)
    d_mask_token_ptr,  # (blocks of places * groups of clips, D) float32
    batch,
    visible,
    length,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_CLS: tl.constexpr,
    KEEP_CLS: tl.constexpr,
):
    # -1 is the class token, which is given a gradient of zeros where it was dropped.
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) - HAS_CLS
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_places = place < length
    in_columns = column < D
    inside = in_places[:, None] & in_columns[None, :]
    has_grad = inside & (place >= -KEEP_CLS)[:, None]

    d_mask_token = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    for clip in range(tl.program_id(2), batch, tl.num_programs(2)):
        source = tl.load(ids_ptr + clip * length + place, mask=in_places & (place >= 0), other=-1).to(tl.int32)
        is_visible = (source < visible)[:, None]
        grad_row = clip * (KEEP_CLS + length) + KEEP_CLS + place
        grad = tl.load(grad_ptr + grad_row.to(tl.int64)[:, None] * D + column[None, :], mask=has_grad, other=0.0)
        d_mask_token += tl.where(is_visible, 0.0, grad.to(tl.float32))
        token_row = clip * (HAS_CLS + visible) + HAS_CLS + source
        tl.store(d_tokens_ptr + token_row.to(tl.int64)[:, None] * D + column[None, :], grad, mask=inside & is_visible)
    partial = tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
    tl.store(d_mask_token_ptr + partial * D + column, tl.sum(d_mask_token, axis=0), mask=in_columns)


def _blocks(tensor: Tensor, rows: int, batch: int, dim: int) -> tuple[tuple[int, int, int], int, int]:
    """The grid, (blocks of places, blocks of columns, groups of clips), and the sizes of a tile."""
    block_d = min(cover(dim), _COLUMNS)
    block_rows = _TILE // block_d
    tiles = triton.cdiv(rows, block_rows), triton.cdiv(dim, block_d)
    programs = num_programs(tensor, tiles[0] * tiles[1] * batch, per_multiprocessor=_PER_MULTIPROCESSOR)
    groups = min(max(programs // max(tiles[0] * tiles[1], 1), 1), batch)
    return (*tiles, groups), block_rows, block_d


def _forward_outputs(
    tokens: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    position: Tensor | None,
    has_cls: bool,
    keep_cls: bool,
    dtype: torch.dtype,
) -> Tensor:
    batch, length = ids_restore.shape
    return tokens.new_empty((batch, int(keep_cls) + length, tokens.shape[2]), dtype=dtype)


@register(outputs=_forward_outputs)
def restore_tokens_forward(
    tokens: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    position: Tensor | None,
    has_cls: bool,
    keep_cls: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Contiguous tensors, shaped as the operator's -> ``(B, keep_cls + L, D)`` of ``dtype``."""
    restored = _forward_outputs(tokens, ids_restore, mask_token, position, has_cls, keep_cls, dtype)
    (batch, length), dim = ids_restore.shape, tokens.shape[2]
    grid, block_rows, block_d = _blocks(tokens, keep_cls + length, batch, dim)
    _forward_kernel[grid](
        tokens,
        ids_restore,
        mask_token,
        position,
        restored,
        batch,
        tokens.shape[1] - has_cls,
        length,
        D=dim,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        HAS_CLS=has_cls,
        KEEP_CLS=keep_cls,
        HAS_POSITION=position is not None,
        HAS_CLS_POSITION=position is not None and position.shape[0] > length,
        num_warps=_WARPS,
    )
    return restored


def _backward_outputs(
    grad: Tensor, ids_restore: Tensor, tokens: int, tokens_dtype: torch.dtype, has_cls: bool
) -> tuple[Tensor, Tensor]:
    batch, _, dim = grad.shape
    return grad.new_empty((batch, tokens, dim), dtype=tokens_dtype), grad.new_empty(dim, dtype=torch.float32)


@register(outputs=_backward_outputs)
def restore_tokens_backward(
    grad: Tensor, ids_restore: Tensor, tokens: int, tokens_dtype: torch.dtype, has_cls: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous gradient of what was restored -> those of the ``tokens`` tokens a clip and of the mask token."""
    d_tokens, d_mask_token = _backward_outputs(grad, ids_restore, tokens, tokens_dtype, has_cls)
    (batch, length), dim = ids_restore.shape, grad.shape[2]
    grid, block_rows, block_d = _blocks(grad, has_cls + length, batch, dim)
    partials = grad.new_empty((grid[0] * grid[2], dim), dtype=torch.float32)
    _backward_kernel[grid](
        grad,
        ids_restore,
        d_tokens,
        partials,
        batch,
        tokens - has_cls,
        length,
        D=dim,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        HAS_CLS=has_cls,
        KEEP_CLS=grad.shape[1] > length,
        num_warps=_WARPS,
    )
    torch.sum(partials, dim=0, out=d_mask_token)
    return d_tokens, d_mask_token


class _RestoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, ids_restore, mask_token, position, has_cls, keep_cls, dtype):
        ctx.save_for_backward(ids_restore)
        ctx.tokens, ctx.tokens_dtype, ctx.has_cls = tokens.shape[1], tokens.dtype, has_cls
        ctx.mask_token_shape, ctx.mask_token_dtype = mask_token.shape, mask_token.dtype
        if position is not None:
            ctx.position_rows, ctx.position_dtype = position.shape[0], position.dtype
        return restore_tokens_forward(tokens, ids_restore, mask_token, position, has_cls, keep_cls, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (ids_restore,) = ctx.saved_tensors
        d_tokens = d_mask_token = d_position = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            d_tokens, d_mask_token = restore_tokens_backward(
                grad.contiguous(), ids_restore, ctx.tokens, ctx.tokens_dtype, ctx.has_cls
            )
            d_mask_token = d_mask_token.view(ctx.mask_token_shape).to(ctx.mask_token_dtype)
        if ctx.needs_input_grad[3]:
            d_position = grad.sum(dim=0, dtype=torch.float32)
            # The class token's row is first where there is one: in the gradient if it was kept, in the table if it
            # has its own. A negative width cuts it off.
            d_position = F.pad(d_position, (0, 0, ctx.position_rows - grad.shape[1], 0)).to(ctx.position_dtype)
        return d_tokens, None, d_mask_token, d_position, None, None, None


def restore_tokens(
    tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, position: Tensor | None, has_cls: bool, keep_cls: bool
) -> Tensor:
    """Write each place once, from its visible token or from the mask token."""
    dtype = torch.promote_types(tokens.dtype, mask_token.dtype)
    if position is not None:
        dtype = torch.promote_types(dtype, position.dtype)
        position = position.contiguous()
    tokens, ids_restore, mask_token = (tensor.contiguous() for tensor in (tokens, ids_restore, mask_token))
    return _RestoreTokens.apply(tokens, ids_restore, mask_token, position, has_cls, keep_cls, dtype)

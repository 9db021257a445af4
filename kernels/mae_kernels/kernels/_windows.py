"""What the window kernels share: where the tokens of a window lie, the parts of a logit, and the choice of tiles.

A tile is a block of queries by a block of keys of one head in one window, padded to powers of two. Windows are numbered
through the batch, row-major in a sample; a place is a token's number in its window.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mae_kernels.kernels._registration import INTERPRETED, cover, dot_precision, num_programs
from mae_kernels.windows import SEAM, padded_grid

_LOG2E = tl.constexpr(math.log2(math.e))
_SEAM = tl.constexpr(SEAM)
_INTERPRETED = tl.constexpr(INTERPRETED)

# Least square of a norm: a vector of zeros has a finite reciprocal norm, and 0 times it is 0.
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

# Programs for each that a GPU holds at once, so that it does not wait for a few last ones.
_WAVES = 4


@triton.jit
def as_operand(x, dtype: tl.constexpr):
    """Round what is to be multiplied. The interpreter holds bfloat16 as integers, and would multiply these."""
    x = x.to(dtype)
    return x.to(tl.float32) if _INTERPRETED else x


@triton.jit
def exp(x):
    """The same as ``tl.exp`` on a GPU, but for denormals, which take it three more instructions."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def corner(window, PADDED: tl.constexpr, WINDOW: tl.constexpr):
    """Find a window's sample, and its first row and column on the shifted grid."""
    ACROSS: tl.constexpr = PADDED[1] // WINDOW[1]
    WINDOWS: tl.constexpr = PADDED[0] // WINDOW[0] * ACROSS
    return window // WINDOWS, window % WINDOWS // ACROSS * WINDOW[0], window % ACROSS * WINDOW[1]


@triton.jit
def locate(window, place, GRID: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Find the tokens at places of a window: their rows in the batch (int64), and whether they are there."""
    sample, top, left = corner(window, PADDED, WINDOW)
    row = (top + place // WINDOW[1] + SHIFT[0]) % PADDED[0]
    column = (left + place % WINDOW[1] + SHIFT[1]) % PADDED[1]
    there = (place < WINDOW[0] * WINDOW[1]) & (row < GRID[0]) & (column < GRID[1])
    return tl.cast(sample, tl.int64) * (GRID[0] * GRID[1]) + row * GRID[1] + column, there


@triton.jit
def reciprocal_norms(q, k, ON_DIAGONAL: tl.constexpr):
    """Find 1 / |q_i| of queries ``(BLOCK_Q, BLOCK_D)`` and 1 / |k_j| of keys ``(BLOCK_K, BLOCK_D)``.

    ON_DIAGONAL takes their squares from the diagonals of q q^T and k k^T: on tensor cores these are exact for 16 bits,
    and lie where the tile of q k^T needs them.
    """
    if ON_DIAGONAL:
        diagonal = tl.arange(0, q.shape[0])[:, None] == tl.arange(0, k.shape[0])[None, :]
        squares_q = tl.sum(tl.where(diagonal, tl.dot(q, tl.trans(q)), 0.0), axis=1)
        squares_k = tl.sum(tl.where(diagonal, tl.dot(k, tl.trans(k)), 0.0), axis=0)
    else:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
        squares_q = tl.sum(q * q, axis=1)
        squares_k = tl.sum(k * k, axis=1)
    return tl.rsqrt(tl.maximum(squares_q, _TINY)), tl.rsqrt(tl.maximum(squares_k, _TINY))


@triton.jit
def add_mask(logits, window, i, j, GRID: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Mask the seam and the grid's padding, for queries at places i ``(BLOCK_Q,)`` and keys at j ``(BLOCK_K,)``."""
    _, top, left = corner(window, PADDED, WINDOW)
    if SHIFT[0] > 0:
        first = (PADDED[0] - SHIFT[0] - top) * WINDOW[1]  # the first place that came round from the grid's start
        apart = (i >= first)[:, None] != (j >= first)[None, :]
    if SHIFT[1] > 0:
        first_column = PADDED[1] - SHIFT[1] - left
        apart_across = (i % WINDOW[1] >= first_column)[:, None] != (j % WINDOW[1] >= first_column)[None, :]
        apart = apart | apart_across if SHIFT[0] > 0 else apart_across
    if SHIFT[0] > 0 or SHIFT[1] > 0:
        logits += tl.where(apart, _SEAM, 0.0)
    if GRID[0] < PADDED[0] or GRID[1] < PADDED[1]:
        _, there = locate(window, j, GRID, PADDED, WINDOW, SHIFT)
        logits = tl.where(there[None, :], logits, float("-inf"))
    return logits


class Tile(NamedTuple):
    """Queries or keys of a block, warps of its program, and programs of a head that share a window."""

    block: int
    warps: int
    blocks: int


class Cut:
    """How ``qkv (B, L, 3 C)`` is cut into windows and tiles. Its layout is grid, window and shift, two numbers each."""

    def __init__(self, qkv: Tensor, num_heads: int, layout: list[int]):
        self.qkv = qkv
        self.heads = num_heads
        self.dim = qkv.shape[2] // (3 * num_heads)
        self.grid, self.window, self.shift = ((layout[i], layout[i + 1]) for i in (0, 2, 4))
        self.padded = padded_grid(self.grid, self.window)
        self.area = self.window[0] * self.window[1]
        self.windows = qkv.shape[0] * (self.padded[0] // self.window[0]) * (self.padded[1] // self.window[1])
        self.block_a, self.block_d = cover(self.area, least=16), cover(self.dim, least=16)

    def tile(self, whole: int) -> Tile:
        """Tile windows of at most ``whole`` places by one block, and larger ones by blocks of 16.

        float32 is multiplied outside of tensor cores, which takes twice the registers.
        """
        wide = 2 if self.qkv.dtype == torch.float32 else 1
        if self.block_a <= whole // wide:
            return Tile(self.block_a, min(wide * max(self.block_a // 16, self.block_d // 64), 8), 1)
        return Tile(16, min(wide * max(self.block_a // 32, self.block_d // 32), 8), triton.cdiv(self.area, 16))

    def workers(self, tile: Tile, *, resident_warps: int) -> int:
        """Programs of a head and block, which share out all windows."""
        per_window = self.heads * tile.blocks
        per_multiprocessor = _WAVES * max(resident_warps // tile.warps, 1)
        programs = num_programs(self.qkv, self.windows * per_window, per_multiprocessor=per_multiprocessor)
        return max(programs // per_window, min(self.windows, 1))

    def tiled_bias(self, bias: Tensor | None) -> Tensor | None:
        """Pad ``bias (heads, A, A)`` to tiles, float32, minus infinity for keys past the area."""
        if self.area == self.block_a:
            return bias if bias is None else bias.float()
        tiled = self.qkv.new_zeros((self.heads, self.block_a, self.block_a), dtype=torch.float32)
        tiled[:, :, self.area :] = -math.inf
        if bias is not None:
            tiled[:, : self.area, : self.area] = bias
        return tiled

    def constants(self) -> dict[str, Any]:
        """What all launches have in common."""
        return {
            "HEADS": self.heads,
            "DIM": self.dim,
            "GRID": self.grid,
            "PADDED": self.padded,
            "WINDOW": self.window,
            "SHIFT": self.shift,
            "BLOCK_A": self.block_a,
            "BLOCK_D": self.block_d,
            # On larger tiles that would cost more than it saves, and on float16 leave its range.
            "ON_DIAGONAL": self.qkv.dtype == torch.bfloat16 and self.block_a == 16,
            "PRECISION": dot_precision(self.qkv),
            # A loop over small tiles loads the next one ahead; others have no registers left for it.
            "num_stages": 2 if self.block_a == 16 and self.qkv.dtype != torch.float32 else 1,
        }

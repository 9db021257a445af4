"""Tiles of whole rows, for kernels that stream rows and reduce along them, and LayerNorm inside such a tile."""

import triton
import triton.language as tl

# Values of a tile, over 4 warps. Backward holds two tiles of sums more.
FORWARD_TILE, BACKWARD_TILE, _WARPS = 4096, 2048, 4


def rows_in_tile(block_d: int, tile: int) -> int:
    """Rows of ``block_d`` values that a tile holds."""
    return max(tile // block_d, 1)


def warps_for(block_d: int, tile: int) -> int:
    """Warps of a program, more where a single row is larger than a tile."""
    return min(_WARPS * max(block_d // tile, 1), 16)


@triton.jit
def normalise_rows(x, inside, eps, D: tl.constexpr):
    """Float32 rows ``x (BLOCK_ROWS, BLOCK_D)`` -> their normalised values, 0 outside; mean; reciprocal deviation."""
    mean = tl.sum(tl.where(inside, x, 0.0), axis=1) / D
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def normalise_rows_backward(grad, normalised, rstd, D: tl.constexpr):
    """Gradient of normalised rows -> gradient of the rows; all are 0 outside."""
    along = tl.sum(grad * normalised, axis=1) / D
    return (grad - (tl.sum(grad, axis=1) / D)[:, None] - normalised * along[:, None]) * rstd[:, None]

"""Shifted windows of a token grid: padding, cyclic shift, partition, merge, and the mask of seam and padding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SEAM = -100.0
"""Added to the logit of two tokens from different sides of the seam, as in published Swin code."""


def padded_grid(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a grid that is padded to multiples of the window."""
    rows, columns = (math.ceil(size / side) * side for size, side in zip(grid, window, strict=True))
    return rows, columns


def window_partition(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Pad, shift and cut ``x (B, rows, columns, ...)`` into windows ``(B, number of windows, A, ...)``."""
    rows, columns = x.shape[1:3]
    pad = (-columns % window[1], -rows % window[0])
    if any(pad):
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, pad[0], 0, pad[1]))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def window_merge(x: Tensor, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Undo :func:`window_partition`: windows ``(B, number of windows, A, C)`` to ``(B, rows, columns, C)``."""
    rows, columns = padded_grid(grid, window)
    x = (
        x.unflatten(1, (rows // window[0], columns // window[1]))
        .unflatten(3, window)
        .transpose(2, 3)
        .flatten(3, 4)
        .flatten(1, 2)
    )
    if any(shift):
        x = x.roll(shift, dims=(1, 2))
    return x[:, : grid[0], : grid[1]]


def window_tokens(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], *, device: torch.device
) -> Tensor:
    """Token at every place of every window, ``(number of windows, A)``; -1 is padding."""
    tokens = torch.arange(1, grid[0] * grid[1] + 1, device=device).view(1, *grid)
    return window_partition(tokens, window, shift)[0] - 1


def token_slots(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], *, device: torch.device
) -> Tensor:
    """Where windows have every token, ``(L,)``: the number of its window times A, plus its place there."""
    padded = padded_grid(grid, window)
    slots = torch.arange(padded[0] * padded[1], device=device).view(1, -1, window[0] * window[1], 1)
    return window_merge(slots, grid, window, shift).flatten()


def window_mask(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], *, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Additive mask ``(number of windows, A, A)`` of the seam and the padding; None where there is neither."""
    padded = padded_grid(grid, window)
    if padded == grid and not any(shift):
        return None
    rows, columns = (torch.arange(size, device=device) for size in padded)
    # After the shift, the last ``shift`` places of an axis hold the tokens that came round from its start.
    wrapped = 2 * (rows >= padded[0] - shift[0])[:, None] + (columns >= padded[1] - shift[1])[None, :]
    side = window_partition(wrapped[None, :, :, None], window, (0, 0)).squeeze(-1)[0]
    padding = ((rows >= grid[0])[:, None] | (columns >= grid[1])[None, :])[None, :, :, None]
    padding = window_partition(padding, window, shift).squeeze(-1)[0]
    mask = torch.zeros(side.shape[0], side.shape[1], side.shape[1], device=device, dtype=dtype)
    mask = mask.masked_fill(side[:, :, None] != side[:, None, :], SEAM)
    # Fewer rows and columns are padding than a window has, so every window holds a token: no row is minus infinity
    # alone.
    return mask.masked_fill(padding[:, None, :], -math.inf)

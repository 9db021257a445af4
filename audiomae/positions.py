"""Position embeddings of a patch grid: fixed 2-D sine-cosine ones, and loaded ones cropped or resized."""

import torch
import torch.nn.functional as F
from mae_kernels import positions
from torch import Tensor


def sincos_2d(grid: tuple[int, int], dim: int, *, layout: str = "true") -> Tensor:
    """Position table ``(1, 1 + L, dim)`` of a grid, with zeros for the class token, in PyTorch's default dtype.

    The first half of a row embeds the *second* grid axis (frequency) and the second half the first (time), as in
    published MAE code, whose mesh puts the width first.

    Args:
        grid: Patches along ``(time, frequency)``.
        dim: A multiple of 4.
        layout: ``"true"``: token ``t * F + f`` gets the embedding of ``(t, f)``. ``"official"``: the released Audio-MAE
            builds the table on the transposed grid, so that it gets that of ``divmod(token, T)`` instead.

    Raises:
        ValueError: ``dim`` is no multiple of 4, or ``layout`` is unknown.
    """
    if layout not in ("true", "official"):
        raise ValueError(f"position_grid is {layout!r}, expected 'true' or 'official'")
    table = positions.sincos_2d(grid if layout == "true" else (grid[1], grid[0]), dim)
    return F.pad(table, (0, 0, 1, 0))[None].to(torch.get_default_device(), torch.get_default_dtype())


def fit_positions(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> tuple[Tensor, str]:
    """Fit a loaded table to another grid.

    A shorter clip takes the leading time rows, which is exact. Any other change interpolates bicubically.

    Args:
        table: ``(1, 1 + L, D)`` on ``source``, the class token's row first.
        source: Patches along ``(time, frequency)`` of the table.
        target: Patches wanted.

    Returns:
        The table ``(1, 1 + L', D)`` on ``target`` and a line that says what was done, empty if nothing.

    Raises:
        ValueError: The table does not have the rows of ``source``.
    """
    if table.dim() != 3 or table.shape[1] != 1 + source[0] * source[1]:
        raise ValueError(f"position table has shape {tuple(table.shape)}, expected (1, {1 + source[0] * source[1]}, D)")
    if source == target:
        return table, ""
    cls, patches = table[:, :1], table[:, 1:].unflatten(1, source)
    if target[1] == source[1] and target[0] < source[0]:
        note = f"position embedding cropped to the first {target[0]} of {source[0]} time steps"
        patches = patches[:, : target[0]]
    else:
        note = f"position embedding interpolated from a grid of {source} to {target}"
        patches = (
            F.interpolate(patches.movedim(-1, 1).float(), size=target, mode="bicubic").movedim(1, -1).to(table.dtype)
        )
    return torch.cat([cls, patches.flatten(1, 2)], dim=1), note

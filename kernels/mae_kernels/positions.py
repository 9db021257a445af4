"""Fixed sine-cosine position embeddings."""

import torch
from torch import Tensor


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Sine-cosine embedding ``(N, dim)`` of ``positions (N,)``: all sines, then all cosines (Vaswani et al. 2017).

    Frequencies fall geometrically from 1 to almost 1/10000. In float64.
    """
    half = dim // 2
    omega = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(grid: tuple[int, int], dim: int) -> Tensor:
    """Embed a grid row-major as ``(rows * columns, dim)``, float64, on the CPU.

    The first half of a row embeds its column and the second half its row, as in MAE, whose mesh puts the width first.

    Args:
        grid: Rows and columns.
        dim: A multiple of 4.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine embedding has {dim} dimensions, expected a multiple of 4")
    tokens = torch.arange(grid[0] * grid[1], device="cpu")
    return torch.cat([sincos_1d(tokens % grid[1], dim // 2), sincos_1d(tokens // grid[1], dim // 2)], dim=1)

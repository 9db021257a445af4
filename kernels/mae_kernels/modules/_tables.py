"""Position tables of modules: learned, or the fixed 2-D sine-cosine ones of MAE."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_kernels.positions import sincos_2d

Position = Literal["learned", "sincos"]


def check_position(module: str, position: str | None, grid: tuple[int, int] | None, dim: int) -> None:
    """Raise ValueError unless ``position`` is a :data:`Position` that grid and width allow, or None."""
    if position not in ("learned", "sincos", None):
        raise ValueError(f"{module}: position is {position!r}, expected 'learned', 'sincos' or None")
    if position == "sincos" and grid is None:
        raise ValueError(f"{module}: grid is a number with position 'sincos', expected rows and columns")
    if position == "sincos" and dim % 4:
        raise ValueError(f"{module}: dim is {dim} with position 'sincos', expected a multiple of 4")


def add_table(
    module: nn.Module, name: str, position: str | None, length: int, dim: int, has_cls: bool, **factory: Any
) -> None:
    """Give a module an empty table ``(1, [1 +] length, dim)``: a parameter if learned, a buffer if fixed, or None."""
    if position is None:
        module.register_parameter(name, None)
        return
    table = torch.empty(1, int(has_cls) + length, dim, **factory)
    if position == "learned":
        module.register_parameter(name, nn.Parameter(table))
    else:
        module.register_buffer(name, table)


def reset_table(table: Tensor | None, position: str | None, grid: tuple[int, int] | None, has_cls: bool) -> None:
    """Initialise a table: a learned one as timm does, N(0, 0.02); a fixed one is 0 for the class token."""
    if table is None:
        return
    if position == "learned":
        nn.init.trunc_normal_(table, std=0.02)
    elif grid is not None:
        table.copy_(F.pad(sincos_2d(grid, table.shape[-1]), (0, 0, int(has_cls), 0))[None])

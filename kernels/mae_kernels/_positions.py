"""Position tables with or without a row for the class token: ``(L, D)``, or ``(1 + L, D)`` with that row first."""

from torch import Tensor


def check_position(operator: str, position: Tensor | None, length: int, dim: int, *, has_cls: bool) -> None:
    """Raise ValueError unless ``position`` is a table for ``length`` tokens of ``dim`` values, or None."""
    if position is None:
        return
    rows = (length, length + 1) if has_cls else (length,)
    if position.dim() != 2 or position.shape[0] not in rows or position.shape[1] != dim:
        expected = " or ".join(f"({n}, {dim})" for n in rows)
        raise ValueError(f"{operator}: position has shape {tuple(position.shape)}, expected {expected}")


def split_position(position: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Split a table into the class token's row ``(1, D)``, None where it has none, and the patches' ``(L, D)``."""
    if position is None or position.shape[0] == length:
        return None, position
    return position[:1], position[1:]

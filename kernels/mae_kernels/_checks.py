"""Argument checks shared by the operators: one line that names the argument, what came and what was expected."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shapes(operator: str, **arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """Match tensors against named sizes and return the sizes.

    Args:
        operator: Name that starts the error line.
        **arguments: Argument name to ``(tensor, dims)``, where ``dims`` names each axis, as in ``"B K"``. A name
            binds to the size of its first occurrence and must have that size wherever it comes again. Where
            ``dims`` starts with ``?``, as in ``"? D"``, the argument may be None.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: A tensor has another number of axes, or a size that contradicts an earlier one.
    """
    sizes: dict[str, int] = {}
    for argument, (tensor, dims) in arguments.items():
        optional, dims = dims.startswith("? "), dims.removeprefix("? ")
        if tensor is None and optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {argument} is a {type(tensor).__name__}, expected a tensor ({dims})")
        names = dims.split()
        bound = dict(sizes)
        fits = tensor.dim() == len(names)
        if not fits or any(sizes.setdefault(n, size) != size for n, size in zip(names, tensor.shape, strict=True)):
            # Only here may a size become text: it would be a constant to torch.compile from then on.
            known = ", ".join(f"{name} = {bound[name]}" for name in names if name in bound)
            expected = f"({', '.join(names)})" + (f" with {known}" if known else "")
            raise ValueError(f"{operator}: {argument} has shape {tuple(tensor.shape)}, expected {expected}")
    return sizes


def check_devices(operator: str, **arguments: Tensor | None) -> None:
    """Raise ValueError unless all tensors share the device of the first."""
    tensors = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    first, *others = tensors
    for name in others:
        if tensors[name].device != tensors[first].device:
            raise ValueError(
                f"{operator}: {name} is on {tensors[name].device}, expected {tensors[first].device}, where {first} is"
            )


def check_floating(operator: str, **arguments: Tensor | None) -> None:
    """Raise TypeError unless all tensors are floating point."""
    for name, tensor in arguments.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} is a {type(tensor).__name__}, expected a tensor")
        if not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} has dtype {tensor.dtype}, expected a floating point dtype")


def check_ids(operator: str, argument: str, ids: Tensor, length: int, *, values: bool) -> None:
    """Raise unless ``ids`` are int64 and, with ``values``, lie in ``[0, length)``; reading waits for the device."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{operator}: {argument} has dtype {ids.dtype}, expected torch.int64")
    if values and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= length:
            raise ValueError(f"{operator}: {argument} holds values from {low} to {high}, expected 0 to {length - 1}")


def pair(operator: str, argument: str, value: int | Sequence[int], *, minimum: int) -> tuple[int, int]:
    """Turn one int or two into ``(rows, columns)``.

    Raises:
        ValueError: Not one or two ints, or one below ``minimum``.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2 or not all(type(v) is int and v >= minimum for v in values):
        raise ValueError(f"{operator}: {argument} is {value}, expected one or two ints of at least {minimum}")
    return values[0], values[1]

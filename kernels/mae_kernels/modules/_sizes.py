"""Sizes that modules are made with: checks that end in one line."""

from collections.abc import Sequence

from mae_kernels._checks import pair
from mae_kernels.patches import grid_shape


def check_count(module: str, argument: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an int of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{module}: {argument} is {value!r}, expected an int of at least 1")


def check_heads(module: str, dim: int, num_heads: int) -> None:
    """Raise ValueError unless heads divide a width."""
    check_count(module, "dim", dim)
    check_count(module, "num_heads", num_heads)
    if dim % num_heads:
        raise ValueError(f"{module}: {num_heads} heads do not divide a width of {dim}")


def read_grid(module: str, grid: int | Sequence[int]) -> tuple[tuple[int, int] | None, int]:
    """Read patches that are given as rows and columns or as their number.

    Returns:
        Rows and columns, None where they are not known, and the number.

    Raises:
        ValueError: Neither one int nor two, or one below 1.
    """
    if isinstance(grid, Sequence):
        rows, columns = pair(module, "grid", grid, minimum=1)
        return (rows, columns), rows * columns
    check_count(module, "grid", grid)
    return None, grid


def patch_grid(
    module: str, image_size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of the patches of an image.

    Raises:
        ValueError: A patch larger than the image, a stride larger than the patch, or patches without overlap that leave
            a margin.
    """
    for image, patch, step in zip(image_size, patch_size, stride, strict=True):
        if patch > image:
            raise ValueError(f"{module}: patch_size is {patch_size}, expected at most the image_size {image_size}")
        if step > patch:
            raise ValueError(f"{module}: stride is {stride}, expected at most the patch_size {patch_size}")
        if step == patch and image % patch:
            raise ValueError(f"{module}: image_size is {image_size}, expected multiples of patch_size {patch_size}")
    return grid_shape(image_size, patch_size, stride)

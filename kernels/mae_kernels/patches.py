"""The order of patches in an image and of values in a patch: what every patch operator agrees on.

Patch ``(row, column)`` is token ``row * columns + column``. Within a patch the order is row, column, channel, channel
fastest, which is that of ``patchify`` in published MAE code and so of its prediction head.
"""

import torch
from torch import Tensor


def grid_shape(image_size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Patches that fit an image, as ``(rows, columns)``.

    Raises:
        ValueError: The image is smaller than a patch.
    """
    if any(size < patch for size, patch in zip(image_size, patch_size, strict=True)):
        raise ValueError(f"an image of {image_size} is smaller than one patch of {patch_size}")
    rows, columns = (
        (size - patch) // step + 1 for size, patch, step in zip(image_size, patch_size, stride, strict=True)
    )
    return rows, columns


def patchify(image: Tensor, patch_size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Cut ``image (B, C, H, W)`` into patches ``(B, L, ph * pw * C)``."""
    patches = image.unfold(2, patch_size[0], stride[0]).unfold(3, patch_size[1], stride[1])
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def gather_patches(image: Tensor, ids: Tensor, patch_size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Cut the patches ``ids (B, K)`` from ``image (B, C, H, W)``, as ``(B, K, C, ph, pw)``; no other is copied."""
    batch, channels, height, width = image.shape
    if image.is_contiguous() and not image.requires_grad and stride == patch_size and width % patch_size[1] == 0:
        # A row of a patch is a row of a matrix, which is copied whole: on CPUs four times as fast as value by value.
        columns = width // patch_size[1]
        first = (ids // columns * (patch_size[0] * columns) + ids % columns)[:, :, None, None]
        rows = first + (torch.arange(batch, device=ids.device) * (channels * height * columns))[:, None, None, None]
        rows = rows + (torch.arange(channels, device=ids.device) * (height * columns))[:, None]
        rows = rows + torch.arange(patch_size[0], device=ids.device) * columns
        return image.view(-1, patch_size[1]).index_select(0, rows.flatten()).view(*rows.shape, patch_size[1])
    windows = image.unfold(2, patch_size[0], stride[0]).unfold(3, patch_size[1], stride[1]).permute(0, 2, 3, 1, 4, 5)
    columns = windows.shape[2]
    sample = torch.arange(batch, device=image.device)[:, None]
    return windows[sample, ids // columns, ids % columns]


def scatter_patches(patches: Tensor, ids: Tensor, image_size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Add patches ``(B, K, C, ph, pw)`` into images ``(B, C, H, W)`` of zeros at ``ids (B, K)``.

    The adjoint of :func:`gather_patches`, and deterministic on every device.
    """
    patch_size = (patches.shape[3], patches.shape[4])
    rows, columns = grid_shape(image_size, patch_size, stride)
    batch = torch.arange(patches.shape[0], device=patches.device)[:, None]
    spread = patches.new_zeros(patches.shape[0], rows * columns, patches.shape[2:].numel())
    spread = spread.index_put((batch, ids), patches.flatten(2), accumulate=True)
    return torch.nn.functional.fold(
        spread.transpose(1, 2), output_size=image_size, kernel_size=patch_size, stride=stride
    )


def unpatchify(
    patches: Tensor, image_size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Put patches ``(B, L, ph * pw * C)`` back into an image ``(B, C, H, W)``.

    Where patches overlap, their mean is taken; a margin that no patch covers is 0.
    """
    columns = patches.unflatten(2, (patch_size[0] * patch_size[1], -1)).permute(0, 3, 2, 1).flatten(1, 2)
    fold = {"output_size": image_size, "kernel_size": patch_size, "stride": stride}
    total = torch.nn.functional.fold(columns, **fold)
    covers = torch.nn.functional.fold(columns.new_ones(1, patch_size[0] * patch_size[1], patches.shape[1]), **fold)
    return total / covers.clamp(min=1)

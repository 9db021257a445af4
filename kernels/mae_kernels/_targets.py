"""Targets of the masked losses: removed patches, normalised each by itself, and the way back to the image."""

import torch
from torch import Tensor

from mae_kernels.patches import gather_patches, scatter_patches


def normalize_patches(patches: Tensor, normalize: bool, eps: float) -> Tensor:
    """Normalise each patch of ``(..., P)`` by its own mean and unbiased variance, if asked to."""
    if not normalize:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()


def removed_patches(image: Tensor, ids: Tensor, patch_size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Patches ``ids (B, R)``, ``(B, R, P)``, in float32 (float64 for float64)."""
    patches = gather_patches(image, ids, patch_size, stride).permute(0, 1, 3, 4, 2).flatten(2)
    return patches.to(torch.promote_types(image.dtype, torch.float32))


def removed_targets(
    image: Tensor, ids: Tensor, patch_size: tuple[int, int], stride: tuple[int, int], normalize: bool, eps: float
) -> Tensor:
    """Targets of the removed patches alone, ``(B, R, P)``, in float32 (float64 for float64)."""
    return normalize_patches(removed_patches(image, ids, patch_size, stride), normalize, eps)


def image_gradient(
    d_target: Tensor,
    image: Tensor,
    ids: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    """Gradient of the image ``(B, C, H, W)`` for that of :func:`removed_targets`, ``(B, R, P)``."""
    if normalize:
        patches = removed_patches(image, ids, patch_size, stride)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        rstd = (variance + eps).rsqrt()
        target = (patches - mean) * rstd
        along = (d_target * target).sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
        d_target = (d_target - d_target.mean(dim=-1, keepdim=True) - target * along) * rstd
    d_patches = d_target.unflatten(2, (*patch_size, image.shape[1])).permute(0, 1, 4, 2, 3)
    return scatter_patches(d_patches, ids, (image.shape[2], image.shape[3]), stride).to(image.dtype)

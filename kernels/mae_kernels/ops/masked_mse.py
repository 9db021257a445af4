r"""Mean squared error over the removed patches, with per-patch normalised targets.

.. math:: \ell = \frac{1}{R P} \sum_{(b, i)\ \mathrm{removed}} \sum_{p} (\hat y_{b,i,p} - t_{b,i,p})^2,
          \qquad t = \frac{x - \mu(x)}{\sqrt{\sigma^2(x) + \epsilon}}

where ``x`` is the patch of the image, ``mu`` and ``sigma^2`` its mean and unbiased variance, R the removed patches of
the whole batch and P the values of a patch (He et al. 2022, "reconstruction target"). Without normalisation ``t =
x``.

Tensors: ``pred (B, L, P)`` with P = C ph pw, ``image (B, C, H, W)``, ``ids_removed (B, R / B)`` int64; out a float32
scalar (float64 for float64). Least traffic, forward: 2 s R P bytes for s bytes a value; about 8 R P FLOPs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels._checks import check_devices, check_floating, check_ids, check_shapes, pair
from mae_kernels._forms import select
from mae_kernels._rows import take_rows
from mae_kernels.patches import gather_patches, grid_shape, patchify


def normalize_patches(patches: Tensor, normalize: bool, eps: float) -> Tensor:
    """Normalise each patch of ``(..., P)`` by its own mean and unbiased variance, if asked to."""
    if not normalize:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()


def patch_targets(
    image: Tensor, patch_size: tuple[int, int], stride: tuple[int, int], normalize: bool, eps: float
) -> Tensor:
    """Targets of every patch, ``(B, L, P)``, in float32 (float64 for float64)."""
    patches = patchify(image.to(torch.promote_types(image.dtype, torch.float32)), patch_size, stride)
    return normalize_patches(patches, normalize, eps)


def reference(
    pred: Tensor,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    """Score every patch and average under the mask, as published code does."""
    target = patch_targets(image, patch_size, stride, normalize, eps)
    error = (pred.to(target.dtype) - target).square().mean(dim=-1)
    mask = torch.zeros_like(error).scatter(1, ids_removed, 1.0)
    return (error * mask).sum() / mask.sum()


def removed_targets(
    image: Tensor,
    ids_removed: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    """Targets of the removed patches alone, ``(B, R, P)``, in float32 (float64 for float64)."""
    patches = gather_patches(image, ids_removed, patch_size, stride).permute(0, 1, 3, 4, 2).flatten(2)
    return normalize_patches(patches.to(torch.promote_types(image.dtype, torch.float32)), normalize, eps)


def removed(
    pred: Tensor,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    """Score the removed patches alone."""
    target = removed_targets(image, ids_removed, patch_size, stride, normalize, eps)
    return F.mse_loss(take_rows(pred, ids_removed).to(target.dtype), target)


FORMS = {"reference": reference, "torch": removed}


def check_loss_arguments(
    operator: str,
    image: Tensor,
    ids_removed: Tensor,
    length: int,
    values: int,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    normalize: bool,
    check: bool,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Check what ``masked_mse`` and ``linear_masked_mse`` share; return patch size and stride as pairs.

    Args:
        operator: Name that starts the error line.
        image: ``(B, C, H, W)``.
        ids_removed: ``(B, R)`` int64.
        length: Patches that are predicted.
        values: Values predicted for a patch.
        patch_size: One int or ``(ph, pw)``.
        stride: One int, ``(sh, sw)`` or None, which is the patch size.
        normalize: The targets are normalised.
        check: Range-check the ids, which waits for the device.

    Raises:
        TypeError: Ids that are not int64.
        ValueError: A wrong shape, nothing removed, or (with ``check``) an id out of range.
    """
    channels, *image_size = image.shape[1:]
    patch_size = pair(operator, "patch_size", patch_size, minimum=1)
    stride = patch_size if stride is None else pair(operator, "stride", stride, minimum=1)
    rows, columns = grid_shape((image_size[0], image_size[1]), patch_size, stride)
    if (rows * columns, channels * patch_size[0] * patch_size[1]) != (length, values):
        raise ValueError(
            f"{operator}: {length} patches of {values} values are predicted, expected {rows * columns} of "
            f"{channels * patch_size[0] * patch_size[1]} for an image of {tuple(image.shape)}"
        )
    if normalize and values == 1:
        raise ValueError(f"{operator}: a patch has 1 value, expected at least 2 to normalise by their variance")
    if ids_removed.numel() == 0:
        raise ValueError(
            f"{operator}: ids_removed has shape {tuple(ids_removed.shape)}, expected at least one removed patch"
        )
    check_ids(operator, "ids_removed", ids_removed, length, values=check)
    return patch_size, stride


def masked_mse(
    pred: Tensor,
    image: Tensor,
    ids_removed: Tensor,
    *,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    check: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Score predictions of the removed patches against the image.

    Args:
        pred: ``(B, L, C * ph * pw)``; rows of visible patches do not count. Values in the order of
            :func:`mae_kernels.patches.patchify`.
        image: ``(B, C, H, W)``.
        ids_removed: ``(B, R)`` int64 patch ids, at least one a row and each once.
        patch_size: One int or ``(ph, pw)``.
        stride: Step between patches; by default the patch size.
        normalize: Normalise each target patch by its own mean and unbiased variance.
        eps: Added to that variance.
        check: Range-check the ids, which waits for the device.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        The loss, a scalar in float32 (float64 for float64).

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device, nothing removed, or (with ``check``) an id out of range.
    """
    sizes = check_shapes("masked_mse", pred=(pred, "B L P"), image=(image, "B C H W"), ids_removed=(ids_removed, "B R"))
    check_floating("masked_mse", pred=pred, image=image)
    check_devices("masked_mse", pred=pred, image=image, ids_removed=ids_removed)
    patch_size, stride = check_loss_arguments(
        "masked_mse", image, ids_removed, sizes["L"], sizes["P"], patch_size, stride, normalize, check
    )
    return select("masked_mse", FORMS, impl, pred)(pred, image, ids_removed, patch_size, stride, normalize, eps)

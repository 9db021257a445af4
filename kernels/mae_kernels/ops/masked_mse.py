r"""Mean squared error over the removed patches, with per-patch normalised targets.

.. math:: \ell = \frac{1}{R P} \sum_{(b, i)\ \mathrm{removed}} \sum_{p} (\hat y_{b,i,p} - t_{b,i,p})^2,
          \qquad t = \frac{x - \mu(x)}{\sqrt{\sigma^2(x) + \epsilon}}

where ``x`` is the patch of the image, ``mu`` and ``sigma^2`` its mean and unbiased variance, R the removed patches of
the whole batch and P the values of a patch (He et al. 2022, "reconstruction target"). Without normalisation ``t =
x``.

Tensors: ``pred (B, L, P)`` with P = C ph pw, ``image (B, C, H, W)``, ``ids_removed (B, R / B)`` int64; out a float32
scalar (float64 for float64). With N = R P, for s bytes a value of ``pred`` and i of ``image``, least traffic is (s +
i) N bytes and 8 N FLOPs forward, s (N + B L P) bytes and 2 N FLOPs backward, which writes zeros for visible patches.
The s N bytes of residuals that backward reads are written by forward; to compute them again it would read i N more.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels._checks import check_devices, check_floating, check_ids, check_shapes, pair
from mae_kernels._forms import select
from mae_kernels._rows import take_rows
from mae_kernels._targets import normalize_patches, removed_targets
from mae_kernels.patches import grid_shape, patchify


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


def triton(
    pred: Tensor,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    """Score the removed patches in one pass over them."""
    from mae_kernels.kernels.masked_mse import masked_mse

    return masked_mse(pred, image, ids_removed, patch_size, stride, normalize, eps)


FORMS = {"reference": reference, "torch": removed, "triton": triton}


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


def wider(x: Tensor, image: Tensor) -> Tensor:
    """Of the two, the tensor whose dtype decides which forms there are: an image in float64 calls for a loss in it."""
    return image if image.dtype == torch.float64 else x


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
    form = select("masked_mse", FORMS, impl, wider(pred, image))
    return form(pred, image, ids_removed, patch_size, stride, normalize, eps)

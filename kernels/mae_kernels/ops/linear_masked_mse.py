r"""The prediction head and the masked loss as one operator.

.. math:: \ell = \mathrm{masked\_mse}(h W^\top + \beta,\ x,\ \mathrm{removed})

Predictions of visible patches do not enter the loss, so the head need only run on the R removed rows, and its
output need not be kept: the gradients of a mean squared error are linear in the residual.

Tensors: ``hidden (B, L, D)``, ``weight (P, D)``, ``bias (P,)``, ``image (B, C, H, W)``, ``ids_removed (B, R / B)``
int64; out a float32 scalar (float64 for float64). Least traffic, forward: s (R D + D P + R P) bytes for s bytes a
value; 2 R D P FLOPs, three times that with both gradients.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mae_kernels._checks import check_devices, check_floating, check_shapes
from mae_kernels._forms import select
from mae_kernels._rows import take_rows
from mae_kernels.ops import masked_mse
from mae_kernels.ops.masked_mse import check_loss_arguments


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    """Predict every patch, then score under the mask, as published code does."""
    return masked_mse.reference(F.linear(hidden, weight, bias), image, ids_removed, patch_size, stride, normalize, eps)


def removed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    ids_removed: Tensor,
    patch_size: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
    eps: float,
) -> Tensor:
    """Compact the removed rows by their ids, then predict and score them alone."""
    target = masked_mse.removed_targets(image, ids_removed, patch_size, stride, normalize, eps)
    pred = F.linear(take_rows(hidden, ids_removed), weight, bias)
    return F.mse_loss(pred.to(target.dtype), target)


FORMS = {"reference": reference, "torch": removed}


def linear_masked_mse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """Predict the removed patches by a linear head and score them against the image.

    Args:
        hidden: ``(B, L, D)`` after the decoder's final norm; rows of visible patches do not count.
        weight: ``(C * ph * pw, D)``, rows in the order of :func:`mae_kernels.patches.patchify`.
        bias: ``(C * ph * pw,)`` or None.
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
    operator = "linear_masked_mse"
    sizes = check_shapes(
        operator,
        hidden=(hidden, "B L D"),
        weight=(weight, "P D"),
        bias=(bias, "? P"),
        image=(image, "B C H W"),
        ids_removed=(ids_removed, "B R"),
    )
    check_floating(operator, hidden=hidden, weight=weight, bias=bias, image=image)
    check_devices(operator, hidden=hidden, weight=weight, bias=bias, image=image, ids_removed=ids_removed)
    patch_size, stride = check_loss_arguments(
        operator, image, ids_removed, sizes["L"], sizes["P"], patch_size, stride, normalize, check
    )
    form = select(operator, FORMS, impl, hidden)
    return form(hidden, weight, bias, image, ids_removed, patch_size, stride, normalize, eps)

r"""The prediction head and the masked loss as one operator.

.. math:: \ell = \mathrm{masked\_mse}(h W^\top + \beta,\ x,\ \mathrm{removed})

Predictions of visible patches do not enter the loss, so the head need only run on the R removed rows, and its
output need not be kept: the gradients of a mean squared error are linear in the residual.

Tensors: ``hidden (B, L, D)``, ``weight (P, D)``, ``bias (P,)``, ``image (B, C, H, W)``, ``ids_removed (B, R / B)``
int64; out a float32 scalar (float64 for float64). For s bytes a value, least traffic is

- the loss: s (R D + P D + R P) bytes, 2 R P D FLOPs, and s R P to keep the residuals;
- the gradient of ``weight``, taken in forward so that ``hidden`` need not be kept: s R (P + D), 2 R P D FLOPs;
- that of ``hidden``, in backward: s (R P + P D + B L D), 2 R P D FLOPs.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mae_kernels._autocast import compute_dtype
from mae_kernels._checks import check_devices, check_floating, check_shapes
from mae_kernels._forms import select
from mae_kernels._rows import take_rows
from mae_kernels._targets import removed_targets
from mae_kernels.ops import masked_mse
from mae_kernels.ops.masked_mse import check_loss_arguments, wider


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
    target = removed_targets(image, ids_removed, patch_size, stride, normalize, eps)
    pred = F.linear(take_rows(hidden, ids_removed), weight, bias)
    return F.mse_loss(pred.to(target.dtype), target)


def triton(
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
    """Predict and score the removed patches in one pass over them."""
    from mae_kernels.kernels.linear_masked_mse import linear_masked_mse

    return linear_masked_mse(hidden, weight, bias, image, ids_removed, patch_size, stride, normalize, eps)


FORMS = {"reference": reference, "torch": removed, "triton": triton}


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
    product_dtype = compute_dtype(hidden.device.type, hidden.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and compute_dtype(hidden.device.type, tensor.dtype) != product_dtype:
            raise TypeError(f"{operator}: {name} has dtype {tensor.dtype}, expected {hidden.dtype}, which hidden has")
    check_devices(operator, hidden=hidden, weight=weight, bias=bias, image=image, ids_removed=ids_removed)
    patch_size, stride = check_loss_arguments(
        operator, image, ids_removed, sizes["L"], sizes["P"], patch_size, stride, normalize, check
    )
    form = select(operator, FORMS, impl, wider(hidden, image))
    return form(hidden, weight, bias, image, ids_removed, patch_size, stride, normalize, eps)

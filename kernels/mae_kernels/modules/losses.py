"""The masked losses: mean squared error over removed patches, against normalised targets (He et al. 2022, section 3).

Values of a patch lie in the order of MAE's ``patchify``: row, column, channel, channel fastest.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_kernels._checks import pair
from mae_kernels._forms import check_impl
from mae_kernels.modules._sizes import check_count
from mae_kernels.ops.linear_masked_mse import linear_masked_mse
from mae_kernels.ops.masked_mse import masked_mse, patch_targets


class _PatchLoss(nn.Module):
    """What both losses are made with."""

    def __init__(
        self,
        patch_size: int | Sequence[int],
        stride: int | Sequence[int] | None,
        normalize: bool,
        eps: float,
        impl: str,
    ):
        super().__init__()
        name = type(self).__name__
        check_impl(impl)
        self.patch_size = pair(name, "patch_size", patch_size, minimum=1)
        self.stride = self.patch_size if stride is None else pair(name, "stride", stride, minimum=1)
        self.normalize, self.eps, self.impl = normalize, eps, impl

    def extra_repr(self) -> str:
        """Name the settings."""
        return (
            f"patch_size={self.patch_size}, stride={self.stride}, normalize={self.normalize}, eps={self.eps}, "
            f"impl={self.impl!r}"
        )


class MaskedMSELoss(_PatchLoss):
    """Score predictions of the removed patches against the image.

    Args:
        patch_size: One int or ``(ph, pw)``.
        stride: Step between patches; by default the patch size.
        normalize: Normalise each target patch by its own mean and unbiased variance.
        eps: Added to that variance.
        impl: Form of the operator.

    Raises:
        ValueError: A patch size or stride that is not positive.
    """

    def __init__(
        self,
        patch_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] | None = None,
        normalize: bool = True,
        eps: float = 1e-6,
        impl: str = "auto",
    ):
        super().__init__(patch_size, stride, normalize, eps, impl)

    def forward(
        self, pred: Tensor, image: Tensor, ids_removed: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the loss, one mean over all removed patches of the batch, from their ids or from a mask.

        Args:
            pred: ``(B, L, C * ph * pw)``; rows of visible patches do not count.
            image: ``(B, C, H, W)``.
            ids_removed: ``(B, R)`` int64 patch ids, at least one a row and each once.
            mask: ``(B, L)``, True or 1 where removed, in place of the ids. How many it removes is known on the device
                alone, so every patch is scored, as published code does, in any form; ids are faster. Its rows may
                remove different numbers of patches. One that removes nothing gives NaN.

        Returns:
            A scalar in float32 (float64 for float64).

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape or device; no ids; neither ids nor a mask, or both.
        """
        if ids_removed is not None:
            if mask is not None:
                raise ValueError("MaskedMSELoss: both of ids_removed and mask given, expected one")
            return masked_mse(
                pred,
                image,
                ids_removed,
                patch_size=self.patch_size,
                stride=self.stride,
                normalize=self.normalize,
                eps=self.eps,
                impl=self.impl,
            )
        if mask is None:
            raise ValueError("MaskedMSELoss: neither of ids_removed and mask given, expected one")
        target = patch_targets(image, self.patch_size, self.stride, self.normalize, self.eps)
        for name, tensor, expected in (("pred", pred, target.shape), ("mask", mask, target.shape[:2])):
            if tensor.shape != expected:
                raise ValueError(
                    f"MaskedMSELoss: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)} for an image "
                    f"of {tuple(image.shape)}"
                )
        weight = mask.to(target.dtype)
        error = (pred.to(target.dtype) - target).square().mean(dim=-1)
        return (error * weight).sum() / weight.sum()


class LinearMaskedMSELoss(_PatchLoss):
    """The prediction head and the masked loss in one: predictions of visible patches are never computed.

    ``weight (C * ph * pw, dim)`` and ``bias (C * ph * pw,)`` are those of the ``nn.Linear`` that it stands in for
    (``decoder_pred`` in MAE), in layout and initialisation.

    Args:
        dim: Width of the decoder's hidden states.
        patch_size: One int or ``(ph, pw)``.
        in_channels: Channels of the image, C.
        bias: The head has a bias.
        stride: Step between patches; by default the patch size.
        normalize: Normalise each target patch by its own mean and unbiased variance.
        eps: Added to that variance.
        device: Of the parameters.
        dtype: Of the parameters.
        impl: Form of the operator.

    Raises:
        ValueError: A size that is not positive.
    """

    def __init__(
        self,
        dim: int,
        patch_size: int | Sequence[int],
        in_channels: int = 3,
        *,
        bias: bool = True,
        stride: int | Sequence[int] | None = None,
        normalize: bool = True,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
    ):
        super().__init__(patch_size, stride, normalize, eps, impl)
        check_count("LinearMaskedMSELoss", "dim", dim)
        check_count("LinearMaskedMSELoss", "in_channels", in_channels)
        self.dim, self.in_channels = dim, in_channels
        values = in_channels * self.patch_size[0] * self.patch_size[1]
        self.weight = nn.Parameter(torch.empty(values, dim, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(values, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear``: both uniform up to dim^-1/2."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.dim**-0.5), self.dim**-0.5)

    def forward(self, hidden: Tensor, image: Tensor, ids_removed: Tensor) -> Tensor:
        """Compute the loss, one mean over all removed patches of the batch.

        Args:
            hidden: ``(B, L, dim)`` after the decoder's final norm, without a class token.
            image: ``(B, in_channels, H, W)``.
            ids_removed: ``(B, R)`` int64 patch ids, at least one a row and each once.

        Returns:
            A scalar in float32 (float64 for float64).

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape or device, or no ids.
        """
        return linear_masked_mse(
            hidden,
            self.weight,
            self.bias,
            image,
            ids_removed,
            patch_size=self.patch_size,
            stride=self.stride,
            normalize=self.normalize,
            eps=self.eps,
            impl=self.impl,
        )

    def predict(self, hidden: Tensor) -> Tensor:
        """Predict every patch of ``hidden (B, L, dim)``: normalised values ``(B, L, in_channels * ph * pw)``."""
        return F.linear(hidden, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"dim={self.dim}, in_channels={self.in_channels}, bias={self.bias is not None}, {super().extra_repr()}"

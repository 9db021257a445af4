r"""LayerNorm of a branch and the residual addition after it, for post-norm blocks.

.. math:: y_b = r_b + c_b \left(\gamma \odot \frac{x_b - \mu(x_b)}{\sqrt{\sigma^2(x_b) + \epsilon}} + \beta\right)

over the last axis, with the biased variance: the "res-post-norm" of Swin V2 (Liu et al. 2022, section 3.2). ``c``
scales a sample's branch, as stochastic depth does; it is 1 by default.

Tensors: ``x``, ``residual (B, ..., D)``, ``weight``, ``bias (D,)``, ``branch_scale (B,)``; out ``(B, ..., D)``. With
N = values in ``x`` and s bytes a value: least traffic is 3 s N bytes forward and 3 s N backward (gradient and ``x`` in,
gradient of ``x`` out; that of the residual is the gradient itself); about 8 N and 12 N FLOPs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels._forms import select
from mae_kernels.ops.add_layer_norm import check_norm_arguments, scale_branch


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, branch_scale: Tensor | None
) -> Tensor:
    """Normalise, then add."""
    return residual + scale_branch(F.layer_norm(x, weight.shape, weight, bias, eps), branch_scale)


def in_place(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, branch_scale: Tensor | None
) -> Tensor:
    """Normalise, then add to what the norm gave: its backward needs its input alone."""
    out = scale_branch(F.layer_norm(x, weight.shape, weight, bias, eps), branch_scale)
    return out.add_(residual) if torch.promote_types(out.dtype, residual.dtype) == out.dtype else out + residual


def triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, branch_scale: Tensor | None
) -> Tensor:
    """Normalise and add in one pass over the rows."""
    from mae_kernels.kernels.layer_norm_add import layer_norm_add

    return layer_norm_add(x, residual, weight, bias, eps, branch_scale)


FORMS = {"reference": reference, "torch": in_place, "triton": triton}


def layer_norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    branch_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Normalise a branch and add it to its residual stream.

    Args:
        x: Output of the branch, ``(B, ..., D)``.
        residual: The stream, ``(B, ..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)``.
        eps: Added to the variance.
        branch_scale: ``(B,)``, multiplies a sample's normalised branch.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        The new stream, ``(B, ..., D)``.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device.
    """
    check_norm_arguments("layer_norm_add", x, residual, weight, bias, branch_scale)
    return select("layer_norm_add", FORMS, impl, x)(x, residual, weight, bias, eps, branch_scale)

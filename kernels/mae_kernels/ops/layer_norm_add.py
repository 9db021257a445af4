r"""LayerNorm of a branch and the residual addition after it, for post-norm blocks.

.. math:: y_b = r_b + c_b \left(\gamma \odot \frac{x_b - \mu(x_b)}{\sqrt{\sigma^2(x_b) + \epsilon}} + \beta\right)

over the last axis, with the biased variance: the "res-post-norm" of Swin V2 (Liu et al. 2022, section 3.2). ``c``
scales a sample's branch, as stochastic depth does; it is 1 by default.

Tensors: ``x``, ``residual (B, ..., D)``, ``weight``, ``bias (D,)``, ``branch_scale (B,)``; out ``(B, ..., D)``. With
N = values in ``x``: least traffic, forward: 3 s N bytes for s bytes a value; about 8 N FLOPs.
"""

import torch.nn.functional as F
from torch import Tensor

from mae_kernels._forms import select
from mae_kernels.ops.add_layer_norm import check_norm_arguments, scale_branch


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, branch_scale: Tensor | None
) -> Tensor:
    """Normalise, then add."""
    return residual + scale_branch(F.layer_norm(x, weight.shape, weight, bias, eps), branch_scale)


FORMS = {"reference": reference}


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

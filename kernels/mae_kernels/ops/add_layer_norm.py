r"""Residual addition and the LayerNorm after it, for pre-norm blocks.

.. math:: s_b = r_b + c_b \, x_b, \qquad y = \gamma \odot \frac{s - \mu(s)}{\sqrt{\sigma^2(s) + \epsilon}} + \beta

over the last axis, with the biased variance (Ba et al. 2016). ``c`` scales a sample's branch, as stochastic depth
does; it is 1 by default. In a pre-norm stack every addition but the last is followed by a norm, so the two cost one
pass.

Tensors: ``x``, ``residual (B, ..., D)``, ``weight``, ``bias (D,)``, ``branch_scale (B,)``; out ``sum`` and
``normed``, both ``(B, ..., D)``. With N = values in ``x`` and s bytes a value: least traffic is 4 s N bytes forward and
4 s N backward (both gradients and ``sum`` in, one gradient out, which is that of ``x`` and of the residual); about 8 N
and 13 N FLOPs.
"""

import torch.nn.functional as F
from torch import Tensor

from mae_kernels._checks import check_devices, check_floating
from mae_kernels._forms import select


def scale_branch(x: Tensor, branch_scale: Tensor | None) -> Tensor:
    """Multiply each sample of ``x (B, ..., D)`` by its ``branch_scale (B,)``."""
    return x if branch_scale is None else x * branch_scale.view(-1, *[1] * (x.dim() - 1))


def check_norm_arguments(
    operator: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, branch_scale: Tensor | None
) -> None:
    """Raise what ``add_layer_norm`` and ``layer_norm_add`` document."""
    check_floating(operator, x=x, residual=residual, weight=weight, bias=bias, branch_scale=branch_scale)
    dim = x.shape[-1:]
    expected = {"residual": (residual, x.shape), "weight": (weight, dim), "bias": (bias, dim)}
    if branch_scale is not None:
        expected["branch_scale"] = (branch_scale, x.shape[:1])
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} for x {tuple(x.shape)}"
            )
    check_devices(operator, x=x, residual=residual, weight=weight, bias=bias, branch_scale=branch_scale)


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, branch_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add, then normalise."""
    total = residual + scale_branch(x, branch_scale)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, branch_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add and normalise in one pass over the rows."""
    from mae_kernels.kernels.add_layer_norm import add_layer_norm

    return add_layer_norm(x, residual, weight, bias, eps, branch_scale)


# PyTorch adds in one pass and normalises in another, and saves for backward what the kernels save.
FORMS = {"reference": reference, "torch": reference, "triton": triton}


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    branch_scale: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to its residual stream and normalise the sum.

    Args:
        x: Output of the branch, ``(B, ..., D)``.
        residual: The stream, ``(B, ..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)``.
        eps: Added to the variance.
        branch_scale: ``(B,)``, multiplies a sample's branch.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``(sum, normed)``: the new stream and the input of the next branch. Under autocast ``sum`` keeps the stream's
        dtype; ``normed`` is float32, but for Triton, which gives it in autocast's dtype, in which the product that
        follows would read it.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device.
    """
    check_norm_arguments("add_layer_norm", x, residual, weight, bias, branch_scale)
    return select("add_layer_norm", FORMS, impl, x)(x, residual, weight, bias, eps, branch_scale)

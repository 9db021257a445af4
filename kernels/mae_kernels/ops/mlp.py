r"""The transformer's two-layer perceptron.

.. math:: y = \mathrm{GELU}(x W_1^\top + b_1) W_2^\top + b_2

with the exact GELU (Hendrycks & Gimpel 2016). Its hidden activations, four times as wide as the rest, are the largest
item of a block in bytes and in memory.

Tensors: ``x (..., D)``, ``fc1_weight (H, D)``, ``fc1_bias (H,)``, ``fc2_weight (E, H)``, ``fc2_bias (E,)``; out
``(..., E)``. With N rows and s bytes a value: least traffic, forward: s (N (D + E) + H (D + E)) bytes; 2 N H (D + E)
FLOPs.
"""

import torch.nn.functional as F
from torch import Tensor

from mae_kernels._checks import check_devices, check_floating, check_shapes
from mae_kernels._forms import select


def reference(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Linear, GELU, linear."""
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


FORMS = {"reference": reference}


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Apply linear, GELU, linear to the last axis.

    Args:
        x: ``(..., D)``.
        fc1_weight: ``(H, D)``.
        fc1_bias: ``(H,)``.
        fc2_weight: ``(E, H)``.
        fc2_bias: ``(E,)``.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``(..., E)``.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device.
    """
    weights = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    sizes = check_shapes(
        "mlp",
        fc1_weight=(fc1_weight, "H D"),
        fc1_bias=(fc1_bias, "H"),
        fc2_weight=(fc2_weight, "E H"),
        fc2_bias=(fc2_bias, "E"),
    )
    if x.dim() == 0 or x.shape[-1] != sizes["D"]:
        raise ValueError(f"mlp: x has shape {tuple(x.shape)}, expected (..., D) with D = {sizes['D']}")
    check_floating("mlp", x=x, **weights)
    check_devices("mlp", x=x, **weights)
    return select("mlp", FORMS, impl, x)(x, **weights)

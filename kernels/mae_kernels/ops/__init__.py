"""The operators, one module each: its meaning (``reference``), its other forms (``FORMS``) and its public function."""

import torch

from mae_kernels._forms import resolve_form
from mae_kernels.ops import (
    add_layer_norm,
    flash_attention,
    layer_norm_add,
    linear_masked_mse,
    masked_mse,
    mlp,
    patch_embed,
    random_mask,
    restore_tokens,
    window_attention,
)

OPERATORS = {
    "random_mask": random_mask,
    "patch_embed": patch_embed,
    "flash_attention": flash_attention,
    "mlp": mlp,
    "add_layer_norm": add_layer_norm,
    "layer_norm_add": layer_norm_add,
    "restore_tokens": restore_tokens,
    "window_attention": window_attention,
    "masked_mse": masked_mse,
    "linear_masked_mse": linear_masked_mse,
}
"""Every operator's module by name, in the order of the model."""


def resolve_forms(impl: str, device_type: str, dtype: torch.dtype) -> dict[str, tuple[str, str]]:
    """Name the form of every operator that ``impl`` means for tensors of this device and dtype, and say why.

    Which library ``flash_attention`` takes depends on more: :func:`mae_kernels.ops.flash_attention.describe` tells it.

    Args:
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.
        device_type: As ``tensor.device.type``.
        dtype: Of the tensors.

    Raises:
        ValueError: ``impl`` is unknown.
        NotImplementedError: An operator does not have that form.
    """
    return {
        name: resolve_form(name, module.FORMS, impl, device_type=device_type, dtype=dtype)
        for name, module in OPERATORS.items()
    }

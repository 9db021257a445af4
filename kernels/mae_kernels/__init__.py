"""Fused operators for masked autoencoders.

Each operator is a function here and a module of the same name in :mod:`mae_kernels.ops`, whose ``reference`` says in
plain PyTorch what it computes. :mod:`mae_kernels.modules` has modules of them for models of your own, :func:`fuse` puts
them into existing ones. Importing this package touches no device.
"""

from mae_kernels._forms import Impl, check_impl
from mae_kernels.ops.add_layer_norm import add_layer_norm
from mae_kernels.ops.flash_attention import flash_attention
from mae_kernels.ops.layer_norm_add import layer_norm_add
from mae_kernels.ops.linear_masked_mse import linear_masked_mse
from mae_kernels.ops.masked_mse import masked_mse
from mae_kernels.ops.mlp import mlp
from mae_kernels.ops.patch_embed import patch_embed
from mae_kernels.ops.random_mask import random_mask
from mae_kernels.ops.restore_tokens import restore_tokens
from mae_kernels.ops.window_attention import window_attention
from mae_kernels.patching import fuse, unfuse

__version__ = "0.1.0"

__all__ = [
    "Impl",
    "add_layer_norm",
    "check_impl",
    "flash_attention",
    "fuse",
    "layer_norm_add",
    "linear_masked_mse",
    "masked_mse",
    "mlp",
    "patch_embed",
    "random_mask",
    "restore_tokens",
    "unfuse",
    "window_attention",
]

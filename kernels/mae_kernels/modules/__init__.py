"""Modules for people who build their own masked autoencoder, on the operators of :mod:`mae_kernels`.

They take MAE's mask convention (True is removed), keep the parameter names and layouts of the modules that they stand
in for, and start from the same initialisation. Each takes ``impl``, the form of its operator: ``"reference"``,
``"torch"``, ``"triton"`` or ``"auto"``. Submodules whose parameters are given to a fused operator are never called, so
that forward hooks on them do not run; FSDP, which lives in hooks, is to shard the module and not its parts.

A model made on the meta device is initialised after ``to_empty`` by the ``reset_parameters`` of each of its modules,
which also fills the buffers that no checkpoint holds.
"""

from mae_kernels.modules.embedding import RestoreTokens, VisiblePatchEmbed
from mae_kernels.modules.layers import AddLayerNorm, FlashSelfAttention, FusedMlp
from mae_kernels.modules.losses import LinearMaskedMSELoss, MaskedMSELoss
from mae_kernels.modules.masking import PatchMask, RandomMasking
from mae_kernels.modules.windowed import WindowAttention

__all__ = [
    "AddLayerNorm",
    "FlashSelfAttention",
    "FusedMlp",
    "LinearMaskedMSELoss",
    "MaskedMSELoss",
    "PatchMask",
    "RandomMasking",
    "RestoreTokens",
    "VisiblePatchEmbed",
    "WindowAttention",
]

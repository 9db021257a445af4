"""Make an existing model call the fused operators: :func:`fuse`, and :func:`unfuse` to undo it."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import nn

from mae_kernels.patching.core import Change, Fused, Report, fuse_targets, unfuse

__all__ = ["Change", "Fused", "Report", "fuse", "unfuse"]


def fuse(model: nn.Module, impl: str = "auto") -> Report:
    """Replace known blocks of a model by forms that call the fused operators, in place.

    Known are masked autoencoders (classes with the shape of ``MaskedAutoencoderViT``, of image MAE and of Audio-MAE;
    transformers' ViTMAE), Swin V1, V2 and V2-CR (timm, torchvision) and timm's ViT. A block keeps its parameters, state
    dictionary, hooks and class, of which its new class is a subclass; other models are not touched. What the fused form
    cannot do is left as it is.

    Call it before DDP, FSDP2 and torch.compile.

    Args:
        model: A model, or a part of one.
        impl: Form of the operators: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        What was replaced by what, and what was left and why.

    Raises:
        ValueError: ``impl`` is unknown.

    Warns:
        UserWarning: Once, if ``"auto"`` finds no Triton or no GPU, so that operators take their PyTorch forms.
    """
    if impl == "auto":
        _warn_of_torch_forms()
    from mae_kernels.patching import mae, swin_timm, swin_torchvision, vit, vit_mae

    targets = [target for module in (mae, vit_mae, swin_timm, swin_torchvision, vit) for target in module.TARGETS]
    return fuse_targets(model, targets, impl)


@cache
def _warn_of_torch_forms() -> None:
    missing = [] if find_spec("triton") else ["triton is not installed"]
    missing += [] if torch.cuda.is_available() else ["no GPU is here"]
    if missing:
        reason = " and ".join(missing)
        warnings.warn(f"fuse: {reason}, so operators take their PyTorch forms", UserWarning, stacklevel=3)

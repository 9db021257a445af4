"""Which form of an operator runs: the one place that reads ``impl``."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch

Impl = Literal["reference", "torch", "triton", "auto"]

# Seeds and ids are int64; all else that operators stream is floating.
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


def check_impl(impl: str) -> None:
    """Raise ValueError unless ``impl`` is one of :data:`Impl`."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(map(repr, get_args(Impl)))}")


def resolve_form(
    operator: str, forms: Mapping[str, Callable[..., Any]], impl: str, *, device_type: str, dtype: torch.dtype
) -> str:
    """Name the form of ``operator`` that ``impl`` means for tensors of this device and dtype.

    ``"auto"`` is Triton on GPUs but for float64, else the PyTorch form of the fused algorithm, else
    the reference. Any other name is taken literally.

    Args:
        operator: Name that starts the error line.
        forms: The forms the operator has, by name.
        impl: One of :data:`Impl`.
        device_type: As ``tensor.device.type``; ROCm devices are ``"cuda"``.
        dtype: Of the tensors that the operator streams.

    Raises:
        ValueError: ``impl`` is unknown.
        NotImplementedError: The operator does not have that form.
    """
    check_impl(impl)
    if impl == "auto":
        if "triton" in forms and device_type == "cuda" and dtype in _TRITON_DTYPES:
            return "triton"
        return "torch" if "torch" in forms else "reference"
    if impl not in forms:
        raise NotImplementedError(
            f"{operator} has no {impl!r} form in this version, only {', '.join(map(repr, forms))}"
        )
    return impl


def select(
    operator: str, forms: Mapping[str, Callable[..., Any]], impl: str, tensor: torch.Tensor
) -> Callable[..., Any]:
    """Return the function of :func:`resolve_form` for a tensor."""
    return forms[resolve_form(operator, forms, impl, device_type=tensor.device.type, dtype=tensor.dtype)]

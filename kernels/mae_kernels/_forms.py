"""Which form of an operator runs: the one place that reads ``impl``."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

Impl = Literal["reference", "torch", "triton", "auto"]

# Seeds and ids are int64; all else that operators stream is floating.
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


# Triton comes with PyTorch on Linux.
_HAS_TRITON = find_spec("triton") is not None


def check_impl(impl: str) -> None:
    """Raise ValueError unless ``impl`` is one of :data:`Impl`."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(map(repr, get_args(Impl)))}")


def resolve_form(
    operator: str, forms: Mapping[str, Callable[..., Any]], impl: str, *, device_type: str, dtype: torch.dtype
) -> tuple[str, str]:
    """Name the form of ``operator`` that ``impl`` means for tensors of this device and dtype, and say why.

    ``"auto"`` is Triton on GPUs but for float64 and where triton is missing, else the PyTorch form of the fused
    algorithm, else the reference. Any other name is taken literally.

    Args:
        operator: Name that starts the error line.
        forms: The forms the operator has, by name.
        impl: One of :data:`Impl`.
        device_type: As ``tensor.device.type``; ROCm devices are ``"cuda"``.
        dtype: Of the tensors that the operator streams.

    Returns:
        The form and, in a few words, the reason.

    Raises:
        ValueError: ``impl`` is unknown.
        NotImplementedError: The operator does not have that form.
    """
    check_impl(impl)
    if impl != "auto":
        if impl not in forms:
            raise NotImplementedError(
                f"{operator} has no {impl!r} form in this version, only {', '.join(map(repr, forms))}"
            )
        return impl, "asked for"
    if "triton" not in forms:
        why = "no Triton kernels"
    elif device_type != "cuda":
        why = f"Triton needs a GPU, this is {device_type}"
    elif not _HAS_TRITON:
        why = "triton is not installed"
    elif dtype not in _TRITON_DTYPES:
        why = f"no Triton kernels for {dtype}"
    else:
        return "triton", f"{device_type}, {dtype}"
    return "torch" if "torch" in forms else "reference", why


def select(
    operator: str, forms: Mapping[str, Callable[..., Any]], impl: str, tensor: torch.Tensor
) -> Callable[..., Any]:
    """Return the function of :func:`resolve_form` for a tensor.

    Raises:
        ImportError: Triton is asked for and not installed.
        TypeError: Triton is asked for and does not compute in the tensor's dtype.
        ValueError: Triton is asked for and does not run on the tensor's device.
    """
    form, _ = resolve_form(operator, forms, impl, device_type=tensor.device.type, dtype=tensor.dtype)
    if form == "triton":
        _check_triton(operator, tensor)
    return forms[form]


def _check_triton(operator: str, tensor: torch.Tensor) -> None:
    if not _HAS_TRITON:
        raise ImportError(f"{operator}: impl is 'triton', which needs the package triton")
    if tensor.dtype not in _TRITON_DTYPES:
        raise TypeError(f"{operator}: impl is 'triton' for {tensor.dtype}, expected float32, bfloat16 or float16")
    if tensor.device.type not in ("cuda", "meta"):
        from mae_kernels.kernels._registration import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f"{operator}: impl is 'triton' for tensors on {tensor.device.type}, expected a CUDA or ROCm device"
            )

"""The boundary between PyTorch and the kernels: registration, and what launches share.

An operator is defined in the library ``mae_kernels`` of :mod:`torch.library`, opaque to ``torch.compile`` and safe
under it; gradients are an ``autograd.Function`` that calls it. Forward and backward together cost 65 us a call so,
against 123 us of ``torch.library.custom_op`` and ``register_autograd`` (torch 2.11, one Xeon core, two tensors).
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on CPU tensors; settled when triton is imported, by TRITON_INTERPRET=1."""

LAUNCHERS: dict[str, Callable[..., Any]] = {}
"""The functions behind the registered operators, by name, each of which launches kernels on whatever it is given."""

_LIBRARY = torch.library.Library("mae_kernels", "DEF")


def register(*, outputs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a function that launches kernels into the operator ``torch.ops.mae_kernels.<its name>``.

    The function's annotations become the schema. Its first argument is a tensor, on whose device it runs; it writes
    none of its arguments.

    Args:
        outputs: Takes the function's arguments and allocates its outputs: what the operator looks like without its
            values, for ``torch.compile``. The function starts by calling it, so that shapes and dtypes are said once.
    """

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        LAUNCHERS[name] = function
        _LIBRARY.define(torch.library.infer_schema(function, mutates_args=(), op_name=name))

        @wraps(function)
        def on_device(first: Tensor, *arguments: Any) -> Any:
            with torch.cuda.device(first.device):  # Triton launches on the current one
                return function(first, *arguments)

        _LIBRARY.impl(name, on_device, "CUDA")
        if INTERPRETED:
            _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"mae_kernels::{name}", outputs, lib=_LIBRARY)
        return getattr(torch.ops.mae_kernels, name).default

    return define


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # An interpreted kernel needs no more than one program to have several partial sums. A tensor without storage
    # stands for the H100 and H200, when kernels are compiled to be read.
    return 132 if device.type == "meta" else 3


def num_programs(tensor: Tensor, blocks: int, *, per_multiprocessor: int) -> int:
    """Persistent programs for ``blocks`` of work: as many as fill the tensor's device, and no more than the blocks."""
    return min(blocks, per_multiprocessor * _multiprocessors(tensor.device))


def cover(size: int, *, least: int = 1) -> int:
    """The power of two that covers ``size``, at least ``least``: a block's length along an axis."""
    return max(triton.next_power_of_2(size), least)


_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """What operands of ``tl.dot`` are rounded to. The interpreter holds bfloat16 as integers, and multiplies these."""
    return tl.float32 if INTERPRETED else _OPERANDS[dtype]


def dot_precision(tensor: Tensor) -> str:
    """``input_precision`` of products of float32: TF32 only where PyTorch's own matrix products may use it."""
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "none":
        precision = getattr(torch.backends, "fp32_precision", "ieee")
    return "tf32" if precision == "tf32" and tensor.dtype == torch.float32 else "ieee"

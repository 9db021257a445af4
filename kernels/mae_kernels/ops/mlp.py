r"""The transformer's two-layer perceptron.

.. math:: y = \mathrm{GELU}(x W_1^\top + b_1) W_2^\top + b_2

with the exact GELU (Hendrycks & Gimpel 2016). Its hidden activations, four times as wide as the rest, are the largest
item of a block in bytes and in memory.

Tensors: ``x (..., D)``, ``fc1_weight (H, D)``, ``fc1_bias (H,)``, ``fc2_weight (E, H)``, ``fc2_bias (E,)``; out
``(..., E)``. With N rows and s bytes a value: 2 N H (D + E) FLOPs forward, twice that backward. Least traffic: s (N +
H) (D + E) bytes forward, s (N (2 D + E) + 2 H (D + E)) backward. Products by a library move 4 s N H bytes more
forward, 8 s N H backward. Kept from forward to backward: s N (D + H) bytes, where autograd keeps s N (D + 2 H).
"""

from collections.abc import Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels._autocast import compute_dtype
from mae_kernels._checks import check_devices, check_floating, check_shapes
from mae_kernels._forms import select

# Activations that the PyTorch form holds at a time on a CPU. From 32 MiB on, glibc takes fresh pages for each tensor.
_CHUNK_BYTES = 16 * 2**20


def reference(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Linear, GELU, linear."""
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def _count_chunks(x: Tensor, width: int) -> int:
    """Chunks in which rows ``x (N, D)`` pass through activations ``(N, width)``.

    On a CPU the pages of fresh memory cost more than the GELU that is computed again. There is one chunk on other
    devices, under a compiler, which would unroll them, and below 32 bits, where each would round the sums of gradients.
    """
    if x.device.type != "cpu" or x.dtype.itemsize < 4 or torch.compiler.is_compiling():
        return 1
    return max(-(-x.shape[0] * width * x.dtype.itemsize // _CHUNK_BYTES), 1)


def _infer(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Output of rows ``x (N, D)``, of which no more than a chunk's activations are held."""
    chunks = _count_chunks(x, fc1_weight.shape[0])
    if chunks == 1:
        return reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    out = x.new_empty(x.shape[0], fc2_weight.shape[0])
    for x_rows, out_rows in zip(x.chunk(chunks), out.chunk(chunks), strict=True):
        activation = torch.ops.aten.gelu_(F.linear(x_rows, fc1_weight, fc1_bias))
        torch.addmm(fc2_bias, activation, fc2_weight.t(), out=out_rows)
    return out


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        hidden = F.linear(x, fc1_weight, fc1_bias)
        out = x.new_empty(x.shape[0], fc2_weight.shape[0])
        chunks = _count_chunks(x, fc1_weight.shape[0])
        for hidden_rows, out_rows in zip(hidden.chunk(chunks), out.chunk(chunks), strict=True):
            torch.addmm(fc2_bias, F.gelu(hidden_rows), fc2_weight.t(), out=out_rows)
        ctx.save_for_backward(x, hidden, fc1_weight, fc2_weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, hidden, fc1_weight, fc2_weight = ctx.saved_tensors
        needs_x, needs_fc1_weight, needs_fc1_bias, needs_fc2_weight, needs_fc2_bias = ctx.needs_input_grad
        d_x, d_fc1_weight, d_fc2_weight = (torch.empty_like(tensor) for tensor in (x, fc1_weight, fc2_weight))
        d_fc1_bias = fc1_weight.new_zeros(fc1_weight.shape[0])
        chunks = _count_chunks(x, fc1_weight.shape[0])
        parts = zip(*(tensor.chunk(chunks) for tensor in (x, hidden, grad, d_x)), strict=True)
        for i, (x_rows, hidden_rows, grad_rows, d_x_rows) in enumerate(parts):
            beta = min(i, 1)  # of what earlier chunks have summed; the first overwrites
            wide = F.gelu(hidden_rows)
            if needs_fc2_weight:
                torch.addmm(d_fc2_weight, grad_rows.t(), wide, beta=beta, out=d_fc2_weight)
            if needs_x or needs_fc1_weight or needs_fc1_bias:
                torch.mm(grad_rows, fc2_weight, out=wide)
                torch.ops.aten.gelu_backward.grad_input(wide, hidden_rows, grad_input=wide)
                d_fc1_bias += wide.sum(dim=0)
            if needs_fc1_weight:
                torch.addmm(d_fc1_weight, wide.t(), x_rows, beta=beta, out=d_fc1_weight)
            if needs_x:
                torch.mm(wide, fc1_weight, out=d_x_rows)
        gradients = d_x, d_fc1_weight, d_fc1_bias, d_fc2_weight, grad.sum(dim=0) if needs_fc2_bias else None
        return tuple(d if need else None for d, need in zip(gradients, ctx.needs_input_grad, strict=True))


def recompute(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Keep the pre-activation alone and compute the activation again in backward, on CPUs a chunk of rows at a time."""
    dtype = compute_dtype(x.device.type, x.dtype)
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    arguments = [tensor.to(dtype) for tensor in (rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments):
        out = _Recompute.apply(*arguments)
    else:
        out = _infer(*arguments)
    return out.view(*x.shape[:-1], out.shape[-1])


def triton(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Two products of the library with one kernel between them."""
    from mae_kernels.kernels.mlp import mlp

    return mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


FORMS = {"reference": reference, "torch": recompute, "triton": triton}


def _check_dtypes(x: Tensor, weights: Mapping[str, Tensor]) -> None:
    device_type = x.device.type
    for name, weight in weights.items():
        if compute_dtype(device_type, weight.dtype) != compute_dtype(device_type, x.dtype):
            raise TypeError(f"mlp: {name} has dtype {weight.dtype}, expected {x.dtype}, which x has")


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
    _check_dtypes(x, weights)
    check_devices("mlp", x=x, **weights)
    return select("mlp", FORMS, impl, x)(x, **weights)

r"""Attention over all tokens, by the fastest library at hand.

.. math:: y_i = \sum_j \mathrm{softmax}_j(s \, \langle q_i, k_j \rangle) \, v_j, \qquad s = d^{-1/2} \text{ by default}

for each head (Vaswani et al. 2017; without the N x N matrix in memory: Dao et al. 2022).

Tensors: ``q``, ``k``, ``v (B, N, heads, d)``, any strides with the last 1, so that views of a packed ``qkv`` need no
copy; out ``(B, N, heads, d)``. With M = B N heads d values in each and s bytes a value: least traffic is 4 s M bytes
forward (q, k, v in, out out) and 8 s M backward (q, k, v, out and its gradient in, three gradients out), and 4 bytes a
row of float32 log-sum-exp each; 4 N M FLOPs forward and 10 N M backward, which recomputes the products.

There is no kernel here: :mod:`mae_kernels.attention_rule` chooses flash-attn or one of PyTorch's kernels. Their
gradients are deterministic where ``torch.use_deterministic_algorithms`` is on; otherwise several blocks of keys may add
to a query's gradient in any order. A ``torch.nn.attention.sdpa_kernel`` around the call governs
what is left to PyTorch, the reference among it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels._autocast import compute_dtype
from mae_kernels._checks import check_devices, check_floating, check_shapes
from mae_kernels._forms import select


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """PyTorch's own attention, with the kernel that PyTorch picks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def chosen(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str | None = None) -> Tensor:
    """The attention that the rule chooses, or that is asked for."""
    from mae_kernels.attention_rule import attend  # it imports PyTorch's compiler

    dtype = compute_dtype(q.device.type, q.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return attend(q, k, v, scale, backend)


# Libraries bring the kernels: both fused forms take the one that the rule chooses.
FORMS = {"reference": reference, "torch": chosen, "triton": chosen}


def describe(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> str:
    """Say in a line which backend calls like this take, and why.

    Args:
        device: Where q, k and v are.
        dtype: In which they are, or autocast has them.
        tokens: N.
        head_dim: Width of a head.
    """
    from mae_kernels.attention_rule import choose_backend

    name, why = choose_backend(device, dtype, tokens, head_dim)
    return f"flash_attention: {name} for {tokens} tokens: {why}"


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend over all tokens, each head for itself.

    Args:
        q: Queries ``(B, N, heads, d)``.
        k: Keys ``(B, N, heads, d)``.
        v: Values ``(B, N, heads, d)``.
        scale: Multiplies the products; by default d^-1/2.
        backend: A name in :data:`mae_kernels.attention_backends.BACKENDS` to force; by default the
            rule chooses.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``(B, N, heads, d)``.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device, or a backend that cannot take the call.
    """
    sizes = check_shapes("flash_attention", q=(q, "B N heads d"), k=(k, "B N heads d"), v=(v, "B N heads d"))
    if sizes["heads"] == 0 or sizes["d"] == 0:  # PyTorch divides by them
        raise ValueError(f"flash_attention: q has shape {tuple(q.shape)}, expected heads and d of at least 1")
    check_floating("flash_attention", q=q, k=k, v=v)
    check_devices("flash_attention", q=q, k=k, v=v)
    dtype = compute_dtype(q.device.type, q.dtype)
    for name, tensor in {"k": k, "v": v}.items():
        if compute_dtype(q.device.type, tensor.dtype) != dtype:
            raise TypeError(f"flash_attention: {name} has dtype {tensor.dtype}, expected {q.dtype}, which q has")
    form = select("flash_attention", FORMS, impl, q)
    if backend is None:
        return form(q, k, v, scale)
    if form is not chosen:
        raise ValueError(
            f"flash_attention: backend is {backend!r} with impl {impl!r}, expected impl 'torch' or 'auto', which choose"
        )
    return form(q, k, v, scale, backend)

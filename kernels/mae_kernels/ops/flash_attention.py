r"""Attention over all tokens.

.. math:: y_i = \sum_j \mathrm{softmax}_j(s \, \langle q_i, k_j \rangle) \, v_j, \qquad s = d^{-1/2} \text{ by default}

for each head (Vaswani et al. 2017; without the N x N matrix in memory: Dao et al. 2022).

Tensors: ``q``, ``k``, ``v (B, N, heads, d)``, any strides with the last 1, so that views of a packed ``qkv`` need no
copy; out ``(B, N, heads, d)``. With s bytes a value: least traffic is 4 s B N heads d bytes; 4 B heads N^2 d FLOPs.
"""

import torch.nn.functional as F
from torch import Tensor

from mae_kernels._checks import check_devices, check_floating, check_shapes
from mae_kernels._forms import select


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """PyTorch's own attention, with the backend that PyTorch picks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


FORMS = {"reference": reference}


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Attend over all tokens, each head for itself.

    Args:
        q: Queries ``(B, N, heads, d)``.
        k: Keys ``(B, N, heads, d)``.
        v: Values ``(B, N, heads, d)``.
        scale: Multiplies the products; by default d^-1/2.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``(B, N, heads, d)``.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or device.
    """
    check_shapes("flash_attention", q=(q, "B N heads d"), k=(k, "B N heads d"), v=(v, "B N heads d"))
    check_floating("flash_attention", q=q, k=k, v=v)
    check_devices("flash_attention", q=q, k=k, v=v)
    return select("flash_attention", FORMS, impl, q)(q, k, v, scale)

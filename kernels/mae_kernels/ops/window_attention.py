r"""Shifted-window attention with a position bias, raster order in and out.

Tokens lie on a grid ``(rows, columns)``, row-major. The grid is padded at its ends to a multiple of the window, shifted
cyclically by ``shift`` towards the origin and cut into windows. Within a window of A tokens, for each head,

.. math:: y_i = \sum_j \mathrm{softmax}_j\bigl(s \, \langle q_i, k_j \rangle + b_{ij} + m_{ij}\bigr) \, v_j

with the scale ``s`` and the bias ``b``; ``m`` is -100 where the shift brought ``i`` and ``j`` together from different
sides of the seam, and minus infinity where ``j`` is padding. With ``cosine``, the product is divided by ``max(|q_i|
|k_j|, cosine_eps)``. Swin (Liu et al. 2021) is a scale of d^-1/2 and a bias table; Swin V2 (Liu et al. 2022) is
cosine attention with a learnt scale; V2-CR (as in timm, and in Audio-MAE's decoder) has the bias of a small MLP over
log offsets.

Tensors: ``qkv (B, L, 3 C)`` laid out [q | k | v][head][dim], ``bias (heads, A, A)``, ``scale (heads,)`` or a number;
out ``(B, L, C)``. With s bytes a value: least traffic is 4 s B L C bytes, and 4 B L A C FLOPs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mae_kernels._checks import check_devices, check_floating, check_shapes, pair
from mae_kernels._forms import select
from mae_kernels.windows import padded_grid, window_mask, window_merge, window_partition


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | float | None,
    cosine: bool,
    cosine_eps: float,
) -> Tensor:
    """Attention inside windows.

    Args:
        q: ``(B, windows, heads, A, d)``, as are ``k`` and ``v``.
        k: Keys.
        v: Values.
        bias: ``(heads, A, A)``.
        mask: ``(windows, A, A)``, added.
        scale: ``(heads,)`` or a number; None is d^-1/2, or 1 with ``cosine``.
        cosine: Divide the products by the norms of query and key.
        cosine_eps: Least product of norms.

    Returns:
        ``(B, windows, heads, A, d)``.
    """
    logits = q @ k.transpose(-2, -1)
    if cosine:
        norms = q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
        logits = logits / norms.clamp(min=cosine_eps)
    if scale is None:
        scale = 1.0 if cosine else q.shape[-1] ** -0.5
    if isinstance(scale, Tensor):
        scale = scale[:, None, None]
    logits = logits * scale
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits + mask[:, None]
    return logits.softmax(dim=-1).to(v.dtype) @ v


def reference(
    qkv: Tensor,
    num_heads: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
    scale: Tensor | float | None,
    cosine: bool,
    cosine_eps: float,
) -> Tensor:
    """Roll, partition, attend, merge, roll back."""
    windows = window_partition(qkv.unflatten(1, grid), window, shift)
    q, k, v = windows.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    mask = window_mask(grid, window, shift, device=qkv.device, dtype=torch.promote_types(qkv.dtype, torch.float32))
    out = attend(q, k, v, bias=bias, mask=mask, scale=scale, cosine=cosine, cosine_eps=cosine_eps)
    return window_merge(out.transpose(2, 3).flatten(3), grid, window, shift).flatten(1, 2)


FORMS = {"reference": reference}


def window_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    grid: tuple[int, int],
    window: int | Sequence[int],
    shift: int | Sequence[int] = (0, 0),
    bias: Tensor | None = None,
    scale: Tensor | float | None = None,
    cosine: bool = False,
    cosine_eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Attend inside shifted windows of a token grid.

    Args:
        qkv: ``(B, L, 3 C)`` laid out [q | k | v][head][dim], tokens row-major.
        num_heads: Heads, which divide ``C``.
        grid: ``(rows, columns)`` of the tokens, with ``rows * columns = L``. A grid that the window does not divide is
            padded at its ends, and the padding gets no attention.
        window: Tokens a window along each axis; A is their product.
        shift: Cyclic shift towards the origin along each axis, less than the padded grid.
        bias: ``(heads, A, A)``, query by key, added to the logits.
        scale: ``(heads,)`` or a number that multiplies the products; by default d^-1/2, and 1 with ``cosine``.
        cosine: Divide the products by the norms of query and key.
        cosine_eps: Least product of norms.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``(B, L, C)``, tokens row-major.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, device, window or shift.
    """
    operator = "window_attention"
    sizes = check_shapes(operator, qkv=(qkv, "B L 3C"))
    rows, columns = pair(operator, "grid", grid, minimum=1)
    if rows * columns != sizes["L"]:
        raise ValueError(f"{operator}: grid is {(rows, columns)}, expected a product of L = {sizes['L']} tokens")
    if type(num_heads) is not int or num_heads < 1 or sizes["3C"] < 3 or sizes["3C"] % (3 * num_heads):
        raise ValueError(
            f"{operator}: qkv has {sizes['3C']} channels, expected a multiple of 3 x num_heads = {num_heads}"
        )
    window = pair(operator, "window", window, minimum=1)
    shift = pair(operator, "shift", shift, minimum=0)
    padded = padded_grid((rows, columns), window)
    if shift[0] >= padded[0] or shift[1] >= padded[1]:
        raise ValueError(f"{operator}: shift is {shift}, expected less than the padded grid {padded} along each axis")
    area = window[0] * window[1]
    if bias is not None and bias.shape != (num_heads, area, area):
        raise ValueError(f"{operator}: bias has shape {tuple(bias.shape)}, expected {(num_heads, area, area)}")
    scale_tensor = scale if isinstance(scale, Tensor) else None
    if scale_tensor is not None and scale_tensor.shape != (num_heads,):
        raise ValueError(
            f"{operator}: scale has shape {tuple(scale_tensor.shape)}, expected {(num_heads,)} or a number"
        )
    check_floating(operator, qkv=qkv, bias=bias, scale=scale_tensor)
    check_devices(operator, qkv=qkv, bias=bias, scale=scale_tensor)
    form = select(operator, FORMS, impl, qkv)
    return form(qkv, num_heads, (rows, columns), window, shift, bias, scale, cosine, cosine_eps)

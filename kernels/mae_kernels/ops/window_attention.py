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

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels._checks import check_devices, check_floating, check_shapes, pair
from mae_kernels._forms import select

SEAM = -100.0
"""Added to the logit of two tokens from different sides of the seam, as in published Swin code."""


def padded_grid(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a grid that is padded to multiples of the window."""
    rows, columns = (math.ceil(size / side) * side for size, side in zip(grid, window, strict=True))
    return rows, columns


def window_partition(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Pad, shift and cut ``x (B, rows, columns, ...)`` into windows ``(B, number of windows, A, ...)``."""
    rows, columns = x.shape[1:3]
    pad = (-columns % window[1], -rows % window[0])
    if any(pad):
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, pad[0], 0, pad[1]))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def window_merge(x: Tensor, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Undo :func:`window_partition`: windows ``(B, number of windows, A, C)`` to ``(B, rows, columns, C)``."""
    rows, columns = padded_grid(grid, window)
    x = (
        x.unflatten(1, (rows // window[0], columns // window[1]))
        .unflatten(3, window)
        .transpose(2, 3)
        .flatten(3, 4)
        .flatten(1, 2)
    )
    if any(shift):
        x = x.roll(shift, dims=(1, 2))
    return x[:, : grid[0], : grid[1]]


def window_mask(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], *, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Additive mask ``(number of windows, A, A)`` of the seam and the padding; None where there is neither."""
    padded = padded_grid(grid, window)
    if padded == grid and not any(shift):
        return None
    rows, columns = (torch.arange(size, device=device) for size in padded)
    # After the shift, the last ``shift`` places of an axis hold the tokens that came round from its start.
    wrapped = 2 * (rows >= padded[0] - shift[0])[:, None] + (columns >= padded[1] - shift[1])[None, :]
    side = window_partition(wrapped[None, :, :, None], window, (0, 0)).squeeze(-1)[0]
    padding = ((rows >= grid[0])[:, None] | (columns >= grid[1])[None, :])[None, :, :, None]
    padding = window_partition(padding, window, shift).squeeze(-1)[0]
    mask = torch.zeros(side.shape[0], side.shape[1], side.shape[1], device=device, dtype=dtype)
    mask = mask.masked_fill(side[:, :, None] != side[:, None, :], SEAM)
    # Fewer rows and columns are padding than a window has, so every window holds a token: no row is minus infinity
    # alone.
    return mask.masked_fill(padding[:, None, :], -math.inf)


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
        norms = q.norm(dim=-1, keepdim=True) @ k.norm(dim=-1, keepdim=True).transpose(-2, -1)
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

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
out ``(B, L, C)``. With s bytes a value, without padding: least traffic, forward: 4 s B L C bytes; 4 B L A C FLOPs.
Backward: 7 s B L C bytes; 10 B L A C FLOPs, a fifth of them to have the probabilities again. Fused forms keep nothing
for backward but their arguments. The Triton form reads qkv and the gradient a second time where a window is larger
than a tile: 11 s B L C bytes, 14 B L A C FLOPs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_kernels._autocast import compute_dtype
from mae_kernels._checks import check_devices, check_floating, check_shapes, pair
from mae_kernels._forms import select
from mae_kernels.windows import (
    padded_grid,
    token_slots,
    window_mask,
    window_merge,
    window_partition,
    window_tokens,
)

# On CPUs the torch form takes so much of qkv at a time, which stays in a core's cache with what is made of it.
_CHUNK_BYTES = 4 * 2**20

# The Triton form holds all keys of a window in a tile, padded to powers of two: at most so many, and of so many values.
_LARGEST_AREA, _LARGEST_TILE = 256, 2**14


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
    scale: Tensor | float,
    cosine: bool,
    cosine_eps: float,
) -> Tensor:
    """Roll, partition, attend, merge, roll back."""
    windows = window_partition(qkv.unflatten(1, grid), window, shift)
    q, k, v = windows.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    mask = window_mask(grid, window, shift, device=qkv.device, dtype=torch.promote_types(qkv.dtype, torch.float32))
    out = attend(q, k, v, bias=bias, mask=mask, scale=scale, cosine=cosine, cosine_eps=cosine_eps)
    return window_merge(out.transpose(2, 3).flatten(3), grid, window, shift).flatten(1, 2)


class _Windows:
    """Rows of d values, one of each token and head, as tokens lie and as windows have them.

    Either way is one copy, by ids of rows: nothing is padded, rolled or transposed.
    """

    def __init__(
        self,
        num_heads: int,
        grid: tuple[int, int],
        window: tuple[int, int],
        shift: tuple[int, int],
        device: torch.device,
    ):
        tokens = window_tokens(grid, window, shift, device=device)
        slots = token_slots(grid, window, shift, device=device)
        windows, self.area = tokens.shape
        self.num_heads = num_heads
        self.token_rows, self.window_rows = len(slots) * num_heads, windows * self.area * num_heads  # of a sample
        self.tokens = tokens.clamp(min=0)[:, None, :]
        self.padding = (tokens < 0)[:, None, :, None] if padded_grid(grid, window) != grid else None
        self.heads = torch.arange(num_heads, device=device)
        first = slots // self.area * (num_heads * self.area) + slots % self.area
        self.places = first[:, None, None] + self.heads * self.area

    def take(self, x: Tensor, parts: int) -> Tensor:
        """Take windows ``(parts, B windows heads, A, d)`` from ``x (B, L, parts heads d)``; padding is zeros."""
        dim = x.shape[2] // (parts * self.num_heads)
        sample, part = (torch.arange(size, device=x.device) for size in (x.shape[0], parts))
        ids = self.tokens * (parts * self.num_heads) + self.heads[:, None]
        ids = ids + (sample * (parts * self.token_rows))[:, None, None, None]
        ids = ids + (part * self.num_heads)[:, None, None, None, None]
        rows = x.reshape(-1, dim).index_select(0, ids.flatten())
        if self.padding is not None:
            rows.view(*ids.shape, dim).masked_fill_(self.padding, 0)
        return rows.view(parts, -1, self.area, dim)

    def put(self, windows: Tensor, out: Tensor) -> None:
        """Undo :meth:`take`: windows ``(parts, B windows heads, A, d)`` into ``out (B, L, parts heads d)``."""
        parts, dim = windows.shape[0], windows.shape[3]
        sample, part = (torch.arange(size, device=out.device) for size in (out.shape[0], parts))
        ids = self.places + (part * (out.shape[0] * self.window_rows))[:, None]
        ids = ids + (sample * self.window_rows)[:, None, None, None]
        torch.index_select(windows.view(-1, dim), 0, ids.flatten(), out=out.view(-1, dim))


def _recompute_attention(
    q: Tensor, k: Tensor, offset: Tensor, scale: Tensor, eps: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attend in windows of queries and keys ``(N, A, d)``.

    Args:
        q: Queries of N = batch x windows x heads.
        k: Keys.
        offset: Bias and mask, ``(windows or 1, heads, A, A)``, float32 or float64.
        scale: ``(heads or 1, 1, 1)``, likewise.
        eps: Least product of norms; None divides by none.

    Returns:
        ``(N, A, A)`` in the dtype of ``offset``: probabilities, products (cosines), and products of norms or None.
    """
    products, norms = torch.bmm(q, k.transpose(1, 2)).to(offset.dtype), None
    if eps is not None:
        norms_q, norms_k = (torch.linalg.vector_norm(x, dim=-1, dtype=offset.dtype) for x in (q, k))
        norms = norms_q.unsqueeze(2) * norms_k.unsqueeze(1)
        products.div_(norms.clamp(min=eps))
    logits = torch.addcmul(offset, products.view(-1, *offset.shape), scale)
    return logits.softmax(dim=-1).view_as(products), products, norms


def _project_out(gradient: Tensor, x: Tensor, along: Tensor) -> None:
    """Take ``along (N, A)``, the gradient's part along x, from ``gradient (N, A, d)``."""
    squares = torch.linalg.vector_norm(x, dim=-1, dtype=along.dtype).square()
    along = along / squares.clamp(min=torch.finfo(along.dtype).tiny)
    gradient.addcmul_(x, along.unsqueeze(2).to(x.dtype), value=-1)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, scale, eps, num_heads, grid, window, shift):
        ctx.save_for_backward(qkv, bias, scale)
        ctx.options = eps, num_heads, grid, window, shift
        windows = _Windows(num_heads, grid, window, shift, qkv.device)
        offset, factor = _offset_and_factor(qkv, bias, scale, num_heads, grid, window, shift)
        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        for qkv_part, out_part in _in_chunks(qkv, out):
            q, k, v = windows.take(qkv_part, 3)
            p, _, _ = _recompute_attention(q, k, offset, factor, eps)
            windows.put(torch.bmm(p.to(v.dtype), v).unsqueeze(0), out_part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, bias, scale = ctx.saved_tensors
        eps, num_heads, grid, window, shift = ctx.options
        _, needs_bias, needs_scale, *_ = ctx.needs_input_grad
        windows = _Windows(num_heads, grid, window, shift, qkv.device)
        offset, factor = _offset_and_factor(qkv, bias, scale, num_heads, grid, window, shift)
        d_qkv, d_bias, d_scale = torch.empty_like(qkv), torch.zeros_like(offset[0]), torch.zeros_like(factor.flatten())
        for qkv_part, grad_part, d_qkv_part in _in_chunks(qkv, grad, d_qkv):
            taken = windows.take(qkv_part, 3)
            q, k, v = taken
            (d_out,) = windows.take(grad_part, 1)
            p, products, norms = _recompute_attention(q, k, offset, factor, eps)
            d_taken = torch.empty_like(taken)
            d_q, d_k, d_v = d_taken
            d_v.baddbmm_(p.to(q.dtype).transpose(1, 2), d_out, beta=0)
            d_logits = torch.bmm(d_out, v.transpose(1, 2)).to(p.dtype)
            d_logits.sub_((d_logits * p).sum(dim=-1, keepdim=True)).mul_(p)
            by_head = (-1, *d_bias.shape)
            if needs_bias:
                d_bias += d_logits.view(by_head).sum(dim=0)
            products.mul_(d_logits)
            if needs_scale:
                d_scale += products.view(by_head).sum(dim=(0, 2, 3))
            d_logits.view(by_head).mul_(factor)
            if norms is not None:
                d_logits.div_(norms.clamp(min=eps))
            d_products = d_logits.to(q.dtype)
            d_q.baddbmm_(d_products, k, beta=0)
            d_k.baddbmm_(d_products.transpose(1, 2), q, beta=0)
            if norms is not None:
                # Where the norms are below eps, the cosine does not depend on them.
                products.masked_fill_(norms < eps, 0).view(by_head).mul_(factor)
                _project_out(d_q, q, products.sum(dim=2))
                _project_out(d_k, k, products.sum(dim=1))
            windows.put(d_taken, d_qkv_part)
        return (
            d_qkv,
            d_bias.to(bias.dtype) if needs_bias else None,
            d_scale.to(scale.dtype) if needs_scale else None,
            *(None,) * 5,
        )


def _offset_and_factor(
    qkv: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    num_heads: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Bias and mask ``(windows or 1, heads, A, A)``, and the scale ``(heads or 1, 1, 1)``."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    area = window[0] * window[1]
    offset = qkv.new_zeros((num_heads, area, area), dtype=dtype) if bias is None else bias.to(dtype)
    mask = window_mask(grid, window, shift, device=qkv.device, dtype=dtype)
    return offset[None] if mask is None else offset + mask[:, None], scale.to(dtype)[:, None, None]


def _in_chunks(qkv: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors into chunks of samples to attend to one after the other: small ones on CPUs, one when traced."""
    if qkv.device.type != "cpu" or torch.compiler.is_compiling():
        return [(qkv, *others)]
    chunks = max(-(-qkv.nbytes // _CHUNK_BYTES), 1)
    return list(zip(*(tensor.chunk(chunks) for tensor in (qkv, *others)), strict=True))


def recompute(
    qkv: Tensor,
    num_heads: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
    scale: Tensor | float,
    cosine: bool,
    cosine_eps: float,
) -> Tensor:
    """Copy rows into windows and back, keep the arguments alone, and compute the probabilities again in backward."""
    qkv = qkv.to(compute_dtype(qkv.device.type, qkv.dtype)).contiguous()
    if not isinstance(scale, Tensor):
        scale = qkv.new_full((1,), scale, dtype=torch.float64)
    return _Recompute.apply(qkv, bias, scale, cosine_eps if cosine else None, num_heads, grid, window, shift)


def fits_a_tile(area: int, dim: int) -> bool:
    """Whether the Triton form takes windows of ``area`` tokens with heads of ``dim``."""
    tokens, width = (1 << (max(size, 16) - 1).bit_length() for size in (area, dim))
    return area <= _LARGEST_AREA and tokens * width <= _LARGEST_TILE


def triton(
    qkv: Tensor,
    num_heads: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
    scale: Tensor | float,
    cosine: bool,
    cosine_eps: float,
) -> Tensor:
    """Attend to windows where they lie.

    Raises:
        ValueError: A window does not fit a tile.
    """
    area, dim = window[0] * window[1], qkv.shape[2] // (3 * num_heads)
    if not fits_a_tile(area, dim):
        raise ValueError(
            f"window_attention: impl is 'triton' for windows of {area} tokens and heads of {dim}, expected at most "
            f"{_LARGEST_AREA} tokens, and {_LARGEST_TILE} values with both rounded up to powers of two"
        )
    from mae_kernels.kernels.window_attention import window_attention

    return window_attention(qkv, num_heads, grid, window, shift, bias, scale, cosine, cosine_eps)


FORMS = {"reference": reference, "torch": recompute, "triton": triton}


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
        ValueError: A wrong shape, device, window or shift; or ``impl`` is ``"triton"`` for windows of more than 256
            tokens, or of more than 16384 values a head. ``"auto"`` takes the PyTorch form there.
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
    dim = sizes["3C"] // (3 * num_heads)
    if scale is None:
        scale = 1.0 if cosine else dim**-0.5
    if impl == "auto" and not fits_a_tile(area, dim):
        impl = "torch"
    form = select(operator, FORMS, impl, qkv)
    return form(qkv, num_heads, (rows, columns), window, shift, bias, scale, cosine, cosine_eps)

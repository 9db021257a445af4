"""The decoders: global, local (shifted windows) and hybrid (arXiv 2207.06405, section 3.3 and figure 3)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from mae_kernels import layer_norm_add, restore_tokens, window_attention
from mae_kernels.ops.window_attention import attend
from mae_kernels.windows import padded_grid, window_mask, window_merge, window_partition
from torch import Tensor, nn

from audiomae.encoder import LAYER_NORM_EPS, Block, Mlp, run_blocks
from audiomae.grid import PatchGrid
from audiomae.masking import PatchMask
from audiomae.positions import sincos_2d

DecoderKind = Literal["local", "hybrid", "global"]

DEFAULT_DEPTH: dict[str, int] = {"local": 16, "hybrid": 12, "global": 8}
"""Blocks of each kind of decoder in the paper."""

MIN_TAU = 0.01
COSINE_EPS = 1e-6
META_HIDDEN_DIM = 384


class MetaMlp(nn.Module):
    """Position bias of a window from log-spaced offsets, ``(heads, A, A)`` (Swin V2, Liu et al. 2022, section 3.3).

    Args:
        window: Tokens a window along time and frequency.
        num_heads: Heads.
        dropout: After the ReLU and on the bias, in training, as the released Audio-MAE has it.
    """

    def __init__(self, window: tuple[int, int], num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.area = window[0] * window[1]
        self.dropout = dropout
        self.fc1 = nn.Linear(2, META_HIDDEN_DIM)
        self.fc2 = nn.Linear(META_HIDDEN_DIM, num_heads)
        self.offsets: Tensor
        times, frequencies = torch.meshgrid(*(torch.arange(side) for side in window), indexing="ij")
        places = torch.stack([times.flatten(), frequencies.flatten()], dim=1).double()
        offsets = places[:, None] - places[None, :]  # query minus key
        logs = (offsets.sign() * offsets.abs().log1p()).flatten(0, 1)
        self.register_buffer("offsets", logs.to(torch.get_default_dtype()), persistent=False)

    def forward(self) -> Tensor:
        """Compute the bias; in the parameters' dtype also under autocast, for it is added to logits."""
        with torch.autocast(self.offsets.device.type, enabled=False):
            hidden = F.dropout(F.relu(self.fc1(self.offsets)), self.dropout, self.training)
            bias = F.dropout(self.fc2(hidden), self.dropout, self.training)
        return bias.t().unflatten(1, (self.area, self.area))


class WindowAttention(nn.Module):
    """Scaled cosine attention inside shifted windows of a token grid, ``(B, L, dim)`` to the same.

    Parameter names are those of timm's first ``swin_transformer_v2_cr``, which the released Audio-MAE builds on.

    Args:
        dim: Width of a token.
        num_heads: Heads, which divide ``dim``.
        grid: Tokens along time and frequency.
        window: Tokens a window along each axis; an axis of the grid that is no longer is one window, not shifted.
        shift: Cyclic shift along each axis.
        bias_dropout: Dropout of the position bias in training.
        impl: Form of the operators.

    Raises:
        ValueError: The heads do not divide the width, or the shift is as large as the padded grid.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window: tuple[int, int],
        shift: tuple[int, int],
        bias_dropout: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a decoder width of {dim}")
        self.num_heads = num_heads
        self.impl = impl
        self.grid = grid
        self.window = (min(grid[0], window[0]), min(grid[1], window[1]))
        self.shift = (shift[0] if grid[0] > window[0] else 0, shift[1] if grid[1] > window[1] else 0)
        padded = padded_grid(grid, self.window)
        if self.shift[0] >= padded[0] or self.shift[1] >= padded[1]:
            raise ValueError(f"shift is {shift}, expected less than the padded token grid {padded} along each axis")
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.meta_mlp = MetaMlp(self.window, num_heads, bias_dropout)
        self.tau = nn.Parameter(torch.ones(num_heads))
        self.mask: Tensor | None
        mask = window_mask(grid, self.window, self.shift, device=torch.device("cpu"), dtype=torch.float32)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        bias, scale = self.meta_mlp(), 1 / self.tau.clamp(min=MIN_TAU)
        if self.impl == "reference":
            return self._attend_partitioned(x, bias, scale)
        out = window_attention(
            self.qkv(x),
            num_heads=self.num_heads,
            grid=self.grid,
            window=self.window,
            shift=self.shift,
            bias=bias,
            scale=scale,
            cosine=True,
            cosine_eps=COSINE_EPS,
            impl=self.impl,
        )
        return self.proj(out)

    def _attend_partitioned(self, x: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        """Roll and partition x before the projection, as published code does."""
        windows = window_partition(x.unflatten(1, self.grid), self.window, self.shift)
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        out = attend(q, k, v, bias=bias, mask=self.mask, scale=scale, cosine=True, cosine_eps=COSINE_EPS)
        out = self.proj(out.transpose(2, 3).flatten(3))
        return window_merge(out, self.grid, self.window, self.shift).flatten(1, 2)


class LocalBlock(nn.Module):
    """Post-norm block with window attention: ``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``.

    Args:
        dim: Width of a token.
        num_heads: Heads, which divide ``dim``.
        grid: Tokens along time and frequency.
        window: Tokens a window along each axis.
        shift: Cyclic shift along each axis.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        bias_dropout: Dropout of the position bias in training.
        impl: Form of the operators.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window: tuple[int, int],
        shift: tuple[int, int],
        mlp_ratio: float = 4.0,
        bias_dropout: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        self.impl = impl
        self.attn = WindowAttention(dim, num_heads, grid, window, shift, bias_dropout, impl)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), impl)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on ``(B, L, dim)``, tokens in raster order."""
        x = self._norm_add(self.attn(x), x, self.norm1)
        return self._norm_add(self.mlp(x), x, self.norm2)

    def _norm_add(self, branch: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return layer_norm_add(branch, x, norm.weight, norm.bias, eps=norm.eps, impl=self.impl)


class Decoder(nn.Module):
    """Tokens of the visible patches in, hidden states of all patches out.

    Args:
        grid: The patch grid of the spectrograms.
        values: Values that are predicted for a patch.
        encoder_dim: Width of the encoder's tokens.
        kind: ``"local"``: shifted windows in every block. ``"hybrid"``: windows, then global attention in the last
            blocks. ``"global"``: attention over all tokens, class token included.
        dim: Width of the decoder's tokens, a multiple of 4.
        depth: Blocks; None is the paper's depth for this kind.
        num_heads: Heads, which divide ``dim``.
        mlp_ratio: Hidden width of the MLPs over ``dim``.
        window: Tokens a window along time and frequency.
        shift: Cyclic shift of every second block along each axis.
        global_layers: Global blocks that end a hybrid decoder.
        bias_dropout: Dropout of the position bias in training.
        position_grid: Layout of the fixed positions, as in :func:`audiomae.positions.sincos_2d`.
        impl: Form of the operators.

    Raises:
        ValueError: Sizes that do not go together.
    """

    def __init__(
        self,
        grid: PatchGrid,
        values: int,
        encoder_dim: int,
        kind: DecoderKind = "local",
        dim: int = 512,
        depth: int | None = None,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        window: tuple[int, int] = (4, 4),
        shift: tuple[int, int] = (2, 0),
        global_layers: int = 4,
        bias_dropout: float = 0.0,
        position_grid: str = "true",
        impl: str = "auto",
    ):
        super().__init__()
        if kind not in DEFAULT_DEPTH:
            raise ValueError(f"decoder is {kind!r}, expected one of {', '.join(map(repr, DEFAULT_DEPTH))}")
        depth = DEFAULT_DEPTH[kind] if depth is None else depth
        self.num_global = {"local": 0, "hybrid": global_layers, "global": depth}[kind]
        if not 0 <= self.num_global <= depth:
            raise ValueError(
                f"a hybrid decoder of {depth} blocks has {global_layers} global ones, expected 0 to {depth}"
            )
        self.has_cls = kind == "global"
        self.impl = impl
        self.pos_embed: Tensor
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_2d(grid.shape, dim, layout=position_grid))
        shifts: Sequence[tuple[int, int]] = ((0, 0), shift)
        local = (
            LocalBlock(dim, num_heads, grid.shape, window, shifts[index % 2], mlp_ratio, bias_dropout, impl)
            for index in range(depth - self.num_global)
        )
        self.blocks = nn.ModuleList([*local, *(Block(dim, num_heads, mlp_ratio, impl) for _ in range(self.num_global))])
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.pred = nn.Linear(dim, values)

    def forward(self, tokens: Tensor, mask: PatchMask) -> Tensor:
        """Decode.

        Args:
            tokens: The encoder's ``(B, 1 + K, encoder_dim)``.
            mask: The mask they were made with.

        Returns:
            Hidden states ``(B, L, dim)`` of all patches in raster order, after the final norm: the input of ``pred``.
        """
        x = restore_tokens(
            self.embed(tokens),
            mask.ids_restore,
            self.mask_token,
            self.pos_embed[0],
            keep_cls=self.has_cls,
            impl=self.impl,
        )
        first_global = len(self.blocks) - self.num_global
        for block in self.blocks[:first_global]:
            x = block(x)
        x = run_blocks(self.blocks[first_global:], x, self.norm)
        return x[:, 1:] if self.has_cls else x

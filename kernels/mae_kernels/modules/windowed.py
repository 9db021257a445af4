"""Attention inside shifted windows: Swin, Swin V2 and V2-CR."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_kernels._checks import pair
from mae_kernels._forms import check_impl
from mae_kernels.modules._sizes import check_heads
from mae_kernels.ops.window_attention import window_attention
from mae_kernels.windows import padded_grid

WindowKind = Literal["swin", "swin_v2", "swin_v2_cr"]

_HIDDEN_DIM = {"swin_v2": 512, "swin_v2_cr": 384}  # of the MLP behind the position bias
_MAX_LOGIT_SCALE = math.log(1 / 0.01)
_BIAS_DROPOUT = 0.125
_NORM_EPS = 1e-12  # of the product of norms here, of each norm in timm


class _MetaMlp(nn.Module):
    """Holds V2-CR's MLP under timm's names and calls it, ``(rows, 2)`` to ``(rows, heads)``."""

    def __init__(self, num_heads: int, dropout: float, **factory: Any):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(2, _HIDDEN_DIM["swin_v2_cr"], **factory)
        self.fc2 = nn.Linear(_HIDDEN_DIM["swin_v2_cr"], num_heads, **factory)

    def forward(self, offsets: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.relu(self.fc1(offsets)), self.dropout, self.training))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside shifted windows of a token grid, ``(B, L, dim)`` to the same, row-major.

    It shifts, cuts windows and puts them back, where timm's attention takes windows that its block has cut. Parameters
    and initialisation are those of timm's attention of each kind:

    - ``"swin"`` (Liu et al. 2021): d^-1/2 scales the products; the bias is ``relative_position_bias_table``.
    - ``"swin_v2"`` (Liu et al. 2022): cosines scaled by ``logit_scale``; the bias is 16 sigmoid(``cpb_mlp``) of
      log-spaced offsets; ``q_bias`` and ``v_bias`` in place of a bias of ``qkv``.
    - ``"swin_v2_cr"``, timm's other reading of it: cosines scaled by ``logit_scale``; the bias is ``meta_mlp`` of log
      offsets. Where a checkpoint has ``tau``, as that of Audio-MAE, ``logit_scale`` is log(1 / tau).

    Args:
        dim: Width of a token.
        num_heads: Heads, which divide ``dim``.
        grid: Rows and columns of the tokens. Where the window does not divide it, padding gets no attention; in timm it
            does.
        window: Tokens a window along each axis, one int or two. As in timm, an axis of the grid that is no longer is
            one window, not shifted.
        shift: Cyclic shift towards the origin along each axis, one int or two.
        kind: See above.
        qkv_bias: The projection to queries, keys and values has a bias, in Swin V2 for queries and values alone.
        pretrained_window: Swin V2's window in pre-training, which log-spaced offsets refer to; by default ``window``.
        bias_dropout: In training, of the hidden values of V2-CR's ``meta_mlp``; by default timm's 0.125.
        device: Of the parameters.
        dtype: Of the parameters.
        impl: Form of the operator.

    Attributes:
        window: Window after the grid has limited it.
        shift: Likewise.

    Raises:
        ValueError: Sizes that do not go together, an unknown kind, or an option out of range or of another kind.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Sequence[int],
        window: int | Sequence[int],
        shift: int | Sequence[int] = 0,
        *,
        kind: WindowKind = "swin",
        qkv_bias: bool = True,
        pretrained_window: int | Sequence[int] | None = None,
        bias_dropout: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        name = "WindowAttention"
        check_impl(impl)
        if kind not in get_args(WindowKind):
            raise ValueError(f"{name}: kind is {kind!r}, expected one of {', '.join(map(repr, get_args(WindowKind)))}")
        for option, value, owner in (
            ("pretrained_window", pretrained_window, "swin_v2"),
            ("bias_dropout", bias_dropout, "swin_v2_cr"),
        ):
            if value is not None and kind != owner:
                raise ValueError(f"{name}: {option} is {value} with kind {kind!r}, expected None but for {owner!r}")
        bias_dropout = _BIAS_DROPOUT if bias_dropout is None else bias_dropout
        if not 0 <= bias_dropout < 1:
            raise ValueError(f"{name}: bias_dropout is {bias_dropout}, expected a number from 0 to below 1")
        check_heads(name, dim, num_heads)
        self.grid = pair(name, "grid", grid, minimum=1)
        self.window, self.shift = _limited(self.grid, pair(name, "window", window, minimum=1), shift)
        self.pretrained_window = (
            self.window if pretrained_window is None else pair(name, "pretrained_window", pretrained_window, minimum=1)
        )
        self.dim, self.num_heads, self.kind, self.impl = dim, num_heads, kind, impl
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias and kind != "swin_v2", **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        sides = [2 * side - 1 for side in self.window]
        area = self.window[0] * self.window[1]
        if kind == "swin":
            self.relative_position_bias_table = nn.Parameter(torch.empty(sides[0] * sides[1], num_heads, **factory))
        else:
            self.log_offsets: Tensor
            self.register_buffer("log_offsets", torch.empty(sides[0] * sides[1], 2, **factory), persistent=False)
        if kind == "swin_v2":
            self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
            self.cpb_mlp = nn.Sequential(
                nn.Linear(2, _HIDDEN_DIM[kind], **factory),
                nn.ReLU(),
                nn.Linear(_HIDDEN_DIM[kind], num_heads, bias=False, **factory),
            )
            self.q_bias: nn.Parameter | None
            self.v_bias: nn.Parameter | None
            for bias in ("q_bias", "v_bias"):
                self.register_parameter(bias, nn.Parameter(torch.empty(dim, **factory)) if qkv_bias else None)
        elif kind == "swin_v2_cr":
            self.logit_scale = nn.Parameter(torch.empty(num_heads, **factory))
            self.meta_mlp = _MetaMlp(num_heads, bias_dropout, **factory)
        self.offset_index: Tensor
        index = torch.empty(area * area, device=device, dtype=torch.int64)
        self.register_buffer("offset_index", index, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what the module holds itself, and fill its buffers; submodules do so themselves."""
        if self.kind == "swin":
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        else:
            nn.init.constant_(self.logit_scale, math.log(10))
            self.log_offsets.copy_(self._make_log_offsets())
        if self.kind == "swin_v2" and self.q_bias is not None and self.v_bias is not None:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)
        self.offset_index.copy_(_make_offset_index(self.window))

    def _make_log_offsets(self) -> Tensor:
        """All offsets of two tokens of a window, ``(offsets, 2)``, on a logarithmic scale.

        In float32, as timm has them also where the module is float64.
        """
        steps = [torch.arange(1 - side, side, dtype=torch.float32, device="cpu") for side in self.window]
        if self.kind == "swin_v2":
            widths = [max(side - 1, 1) for side in self.pretrained_window]
            steps = [8 * (step / width) for step, width in zip(steps, widths, strict=True)]
        offsets = torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1).flatten(0, 1)
        if self.kind == "swin_v2":
            return offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)
        return offsets.sign() * torch.log(1 + offsets.abs())

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: ``(B, L, dim)``, tokens row-major over the grid.

        Returns:
            ``(B, L, dim)``.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape or device.
        """
        length = self.grid[0] * self.grid[1]
        if x.dim() != 3 or x.shape[1:] != (length, self.dim):
            raise ValueError(f"WindowAttention: x has shape {tuple(x.shape)}, expected (B, {length}, {self.dim})")
        cosine = self.kind != "swin"
        out = window_attention(
            self._project(x),
            num_heads=self.num_heads,
            grid=self.grid,
            window=self.window,
            shift=self.shift,
            bias=self._position_bias(),
            scale=self.logit_scale.flatten().clamp(max=_MAX_LOGIT_SCALE).exp() if cosine else None,
            cosine=cosine,
            cosine_eps=_NORM_EPS,
            impl=self.impl,
        )
        return self.proj(out)

    def _project(self, x: Tensor) -> Tensor:
        if self.kind != "swin_v2" or self.q_bias is None or self.v_bias is None:
            return self.qkv(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias)

    def _position_bias(self) -> Tensor:
        """Bias of every pair of tokens of a window, ``(heads, A, A)``; not in autocast's dtype, as it joins logits."""
        if self.kind == "swin":
            pairs = self.relative_position_bias_table[self.offset_index]
        else:
            device_type = self.log_offsets.device.type
            with torch.autocast("cuda" if device_type == "meta" else device_type, enabled=False):
                pairs = self._mlp_bias()
        return pairs.t().unflatten(1, (self.window[0] * self.window[1], -1))

    def _mlp_bias(self) -> Tensor:
        """Bias of every pair of tokens, ``(A * A, heads)``, from the MLP of the kind."""
        if self.kind == "swin_v2":
            return (16 * self.cpb_mlp(self.log_offsets).sigmoid())[self.offset_index]
        if self.training and self.meta_mlp.dropout > 0:  # drawn for every pair, not for every offset
            return self.meta_mlp(self.log_offsets[self.offset_index])
        return self.meta_mlp(self.log_offsets)[self.offset_index]

    def extra_repr(self) -> str:
        """Name the settings."""
        return (
            f"num_heads={self.num_heads}, grid={self.grid}, window={self.window}, shift={self.shift}, "
            f"kind={self.kind!r}, impl={self.impl!r}"
        )


def _limited(
    grid: tuple[int, int], window: tuple[int, int], shift: int | Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Window and shift for a grid, along each axis.

    Raises:
        ValueError: Negative shifts, or shifts as large as the padded grid.
    """
    asked = pair("WindowAttention", "shift", shift, minimum=0)
    window = (min(grid[0], window[0]), min(grid[1], window[1]))
    limited = (asked[0] if grid[0] > window[0] else 0, asked[1] if grid[1] > window[1] else 0)
    padded = padded_grid(grid, window)
    if limited[0] >= padded[0] or limited[1] >= padded[1]:
        raise ValueError(f"WindowAttention: shift is {asked}, expected less than the padded grid {padded}")
    return window, limited


def _make_offset_index(window: tuple[int, int]) -> Tensor:
    """Which offset every pair of tokens of a window has, query minus key, ``(A * A,)``, query by key."""
    rows, columns = torch.meshgrid(*(torch.arange(side, device="cpu") for side in window), indexing="ij")
    row, column = (places.flatten() for places in (rows, columns))
    row_offset = row[:, None] - row[None, :] + window[0] - 1
    column_offset = column[:, None] - column[None, :] + window[1] - 1
    return (row_offset * (2 * window[1] - 1) + column_offset).flatten()

"""Fused forms of the blocks of timm's Swin Transformer, V1, V2 and V2-CR: attention, and additions with their norms.

A block calls its MLP as a module, which is replaced for itself. It does not call as modules: its attention, the norms
of its additions (V1: ``norm2``), and their drop paths; of the attention, linear layers are called, on all tokens in
raster order where timm calls them on windows, and the classes' own methods give the position bias where there are such.

timm pads a grid that the window does not divide with zeros at the ends of the shifted grid, before queries, keys and
values are made, and lets the padding take part in attention; so do V1 and V2 here. What the class runs itself:

- attention with its dropouts on, whose numbers are drawn in the order of windows;
- attention on another grid than a shifted block's mask was made for, or with a shift that was set or taken away since
  the block was fused, when its mask was compared with that of its shift; ``set_input_size`` makes both anew;
- V2-CR's attention on a padded grid: there the keys of padding may be zero, and their gradient, which a bias learns
  from, is what timm's bound of a norm makes of it.

timm 1.0.15 to 1.0.31 is known.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_kernels.ops.window_attention import window_attention
from mae_kernels.patching.core import Fused, Target, find_unexpected
from mae_kernels.patching.parts import add_normed, add_to_stream, cosine_options, find_norm_refusal, known_classes
from mae_kernels.windows import padded_grid, window_mask


def masks_its_seam(block: Any, x: Tensor, resolution: tuple[int, int]) -> bool:
    """Whether the mask that a block adds for tokens ``x (B, H, W, C)`` is that of its shift, and nothing is dropped.

    Args:
        block: Whose mask was that of its shift when it was fused.
        x: Tokens.
        resolution: The grid that its mask was made for.
    """
    attn = block.attn
    if attn.training and (attn.attn_drop.p > 0 or attn.proj_drop.p > 0):
        return False
    if block.dynamic_mask:
        return True
    if not any(block.shift_size):
        return block.attn_mask is None
    made_for, padded = (padded_grid((grid[0], grid[1]), block.window_size) for grid in (resolution, x.shape[1:3]))
    return block.attn_mask is not None and padded == made_for


def pad_to_windows(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Pad ``x (B, H, W, C)`` to a multiple of the window, with zeros that the shift brings to the grid's ends."""
    pad = -x.shape[2] % window[1], -x.shape[1] % window[0]
    if not any(pad):
        return x
    shifted = x.roll((-shift[0], -shift[1]), dims=(1, 2))
    return F.pad(shifted, (0, 0, 0, pad[0], 0, pad[1])).roll(shift, dims=(1, 2))


def attend_windows(block: Any, x: Tensor, qkv: Tensor, bias: Tensor, **options: Any) -> Tensor:
    """Attend in a block's windows, and project.

    Args:
        block: Of timm, of any kind.
        x: Tokens, ``(B, H, W, C)``.
        qkv: Queries, keys and values of the padded tokens, ``(B, padded H, padded W, 3 C)``.
        bias: Of position, ``(1, heads, A, A)``.
        **options: Of ``window_attention``, for the kind of attention.

    Returns:
        ``(B, H, W, C)``.
    """
    rows, columns = x.shape[1:3]
    grid, shift = (qkv.shape[1], qkv.shape[2]), tuple(block.shift_size)
    out = window_attention(
        qkv.flatten(1, 2),
        num_heads=block.attn.num_heads,
        grid=grid,
        window=tuple(block.window_size),
        shift=shift,
        bias=bias.squeeze(0),
        impl=block.fused_impl,
        **options,
    )
    out = out.unflatten(1, grid)
    if grid != (rows, columns):
        shifted = out.roll((-shift[0], -shift[1]), dims=(1, 2))
        out = shifted[:, :rows, :columns].roll(shift, dims=(1, 2))
    return block.attn.proj_drop(block.attn.proj(out))


def run_post_norm(block: Any, attended: Tensor, x: Tensor) -> Tensor:
    """Add the attention's branch and the MLP's to a block's tokens ``x (B, H, W, C)``; returns ``(B, H W, C)``."""
    first, second = (getattr(drop, "drop_prob", 0.0) for drop in (block.drop_path1, block.drop_path2))
    x = add_normed(attended, x, block.norm1, block.drop_path1, first, block.fused_impl).flatten(1, 2)
    return add_normed(block.mlp(x), x, block.norm2, block.drop_path2, second, block.fused_impl)


class SwinBlock(Fused, nn.Module):
    """``window_attention`` with the bias of a table, and ``add_layer_norm`` between the branches."""

    attn: Any
    drop_path1: nn.Module
    drop_path2: nn.Module
    input_resolution: tuple[int, int]
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.LayerNorm
    shift_size: tuple[int, int]
    window_size: tuple[int, int]

    def _attn(self, x: Tensor) -> Tensor:
        if not masks_its_seam(self, x, self.input_resolution):
            return super()._attn(x)  # type: ignore[misc]
        attn = self.attn
        qkv = attn.qkv(pad_to_windows(x, self.window_size, self.shift_size))
        scale = None if attn.fused_attn else attn.scale
        return attend_windows(self, x, qkv, attn._get_rel_pos_bias(), scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x (B, H, W, C)``."""
        grid = x.shape[1:3]
        branch, rate = self._attn(self.norm1(x)), getattr(self.drop_path1, "drop_prob", 0.0)
        x, normed = add_to_stream(branch, x, self.norm2, self.drop_path1, rate, self.fused_impl)
        out = x.flatten(1, 2) + self.drop_path2(self.mlp(normed.flatten(1, 2)))
        return out.unflatten(1, grid)


class SwinBlockV2(Fused, nn.Module):
    """``window_attention`` by cosines, with the bias of a small MLP, and ``layer_norm_add`` after each branch."""

    attn: Any
    drop_path1: nn.Module
    drop_path2: nn.Module
    input_resolution: tuple[int, int]
    mlp: nn.Module
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    shift_size: tuple[int, int]
    window_size: tuple[int, int]

    def _attn(self, x: Tensor) -> Tensor:
        if not masks_its_seam(self, x, self.input_resolution):
            return super()._attn(x)  # type: ignore[misc]
        attn = self.attn
        padded = pad_to_windows(x, self.window_size, self.shift_size)
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if bias is not None and attn.qkv_bias_separate:
            qkv = attn.qkv(padded)
            qkv += bias  # in place, which keeps autocast's dtype
        else:
            qkv = F.linear(padded, attn.qkv.weight, bias)
        table = 16 * attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads).sigmoid()
        area = self.window_size[0] * self.window_size[1]
        position_bias = table[attn.relative_position_index.view(-1)].view(1, area, area, -1)
        return attend_windows(self, x, qkv, position_bias.permute(0, 3, 1, 2), **cosine_options(attn.logit_scale))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x (B, H, W, C)``."""
        return run_post_norm(self, self._attn(x), x).unflatten(1, x.shape[1:3])


class SwinBlockV2Cr(Fused, nn.Module):
    """As V2; some blocks have a norm at their end."""

    attn: Any
    drop_path1: nn.Module
    drop_path2: nn.Module
    feat_size: tuple[int, int]
    mlp: nn.Module
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.Module
    window_size: tuple[int, int]

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        grid = x.shape[1], x.shape[2]
        if padded_grid(grid, self.window_size) != grid or not masks_its_seam(self, x, self.feat_size):
            return super()._shifted_window_attn(x)  # type: ignore[misc]
        attn = self.attn
        qkv = attn.qkv(x)
        # After the projection, as in timm: it draws dropout.
        bias = attn._relative_positional_encodings()
        return attend_windows(self, x, qkv, bias, **cosine_options(attn.logit_scale))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x (B, H, W, C)``."""
        return self.norm3(run_post_norm(self, self._shifted_window_attn(x), x)).unflatten(1, x.shape[1:3])


def find_attention_refusal(block: Any, name: str, *parts: str) -> str | None:
    """Why a block's attention cannot be fused; None if it can.

    Args:
        block: A block.
        name: Qualified name of the class that its attention must have.
        *parts: Further submodules of that class that are not called.
    """
    attn = block.attn
    own = type(attn)
    if f"{own.__module__}.{own.__qualname__}" != name:
        return f"attn is {own.__name__}, expected {name}"
    if "forward" in vars(attn):
        return "the forward of attn was replaced"
    linear: dict[str, type] = {"attn.qkv": nn.Linear, "attn.proj": nn.Linear}
    dropout: dict[str, type] = {"attn.attn_drop": nn.Dropout, "attn.proj_drop": nn.Dropout}
    softmax: dict[str, type] = {f"attn.{part}": nn.Softmax for part in parts}
    unexpected = find_unexpected(block, {"attn": own} | linear | dropout | softmax)
    if unexpected is not None:
        return unexpected
    return f"attn.attn_drop drops attention at a rate of {attn.attn_drop.p}" if attn.attn_drop.p > 0 else None


def find_mask_refusal(block: Any, resolution: tuple[int, int]) -> str | None:
    """Why ``window_attention`` would mask otherwise than a block does; None if it would not."""
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    grid = padded_grid((resolution[0], resolution[1]), (window[0], window[1]))
    if any(not 0 <= s < size for s, size in zip(shift, grid, strict=True)):
        return f"shift_size is {shift}, expected 0 or more and less than the padded grid {grid}"
    mask = block.get_attn_mask(torch.empty(1, *grid, 1)) if block.dynamic_mask else block.attn_mask
    if mask is None:
        return "has no attn_mask, and a shift_size" if any(shift) else None
    expected = window_mask(grid, window, shift, device=mask.device, dtype=mask.dtype)
    # A mask on the meta device has no values yet.
    if expected is None or mask.shape != expected.shape or not (mask.is_meta or torch.equal(mask, expected)):
        return f"attn_mask is not that of window_size {window} and shift_size {shift}"
    return None


def find_drop_path_refusal(block: Any, *paths: str) -> str | None:
    """Why a block's drop paths cannot be drawn beforehand; None if they can."""
    name = "timm.layers.drop.DropPath"
    return find_unexpected(block, {path: known_classes(block.get_submodule(path), nn.Identity, name) for path in paths})


def find_block_refusal(block: Any) -> str | None:
    """Why a SwinTransformerBlock cannot be fused; None if it can."""
    return (
        find_attention_refusal(block, f"{_V1}.WindowAttention", "softmax")
        or find_mask_refusal(block, block.input_resolution)
        or find_drop_path_refusal(block, "drop_path1")
        or find_norm_refusal(block, "norm2")
    )


def find_block_v2_refusal(block: Any) -> str | None:
    """Why a SwinTransformerV2Block cannot be fused; None if it can."""
    return (
        find_attention_refusal(block, f"{_V2}.WindowAttention", "softmax")
        or find_mask_refusal(block, block.input_resolution)
        or find_post_norm_refusal(block)
    )


def find_block_v2_cr_refusal(block: Any) -> str | None:
    """Why a SwinTransformerV2CrBlock cannot be fused; None if it can."""
    return (
        find_attention_refusal(block, f"{_V2_CR}.WindowMultiHeadAttention")
        or ("attn is sequential" if block.attn.sequential_attn else None)
        or find_mask_refusal(block, block.feat_size)
        or find_post_norm_refusal(block)
    )


def find_post_norm_refusal(block: Any) -> str | None:
    """Why the additions of a post-norm block cannot be fused; None if they can."""
    return (
        find_drop_path_refusal(block, "drop_path1", "drop_path2")
        or find_norm_refusal(block, "norm1")
        or find_norm_refusal(block, "norm2")
    )


_V1, _V2, _V2_CR = (f"timm.models.swin_transformer{suffix}" for suffix in ("", "_v2", "_v2_cr"))
_PRE_NORM, _POST_NORM = ("window_attention", "add_layer_norm"), ("window_attention", "layer_norm_add")

TARGETS: tuple[Target, ...] = (
    Target(f"{_V1}.SwinTransformerBlock", SwinBlock, _PRE_NORM, find_block_refusal),
    Target(f"{_V2}.SwinTransformerV2Block", SwinBlockV2, _POST_NORM, find_block_v2_refusal),
    Target(f"{_V2_CR}.SwinTransformerV2CrBlock", SwinBlockV2Cr, _POST_NORM, find_block_v2_cr_refusal),
)

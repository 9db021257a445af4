"""The encoder: a pre-norm Vision Transformer over visible patches (arXiv 2207.06405, section 3.2)."""

from collections.abc import Iterable
from typing import Self, cast

import torch
from mae_kernels import add_layer_norm, flash_attention, mlp, patch_embed
from mae_kernels.ops.add_layer_norm import scale_branch
from mae_kernels.ops.random_mask import noise
from torch import Tensor, nn

from audiomae.config import EncoderConfig
from audiomae.grid import PatchGrid
from audiomae.masking import PatchMask
from audiomae.positions import sincos_2d

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, ``(B, N, dim)`` to the same.

    Args:
        dim: Width of a token.
        num_heads: Heads, which divide ``dim``.
        impl: Form of the operators.

    Raises:
        ValueError: The heads do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int, impl: str = "auto"):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(flash_attention(q, k, v, impl=self.impl).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear, ``(..., dim)`` to the same.

    Args:
        dim: Width of a token.
        hidden_dim: Width between the layers.
        impl: Form of the operators.
    """

    def __init__(self, dim: int, hidden_dim: int, impl: str = "auto"):
        super().__init__()
        self.impl = impl
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers."""
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, impl=self.impl)


class Block(nn.Module):
    """Pre-norm transformer block with the parameter names of timm's ``Block``.

    The norm that opens a block is computed where the previous residual sum is, in one operator, so a block takes and
    gives both the residual stream and its normalised form; :func:`run_blocks` chains them.

    Args:
        dim: Width of a token.
        num_heads: Heads, which divide ``dim``.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        impl: Form of the operators.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, impl: str = "auto"):
        super().__init__()
        self.impl = impl
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, impl)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), impl)

    def forward(
        self, x: Tensor, normed: Tensor, next_norm: nn.LayerNorm | None, branch_scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x: The residual stream ``(B, N, dim)``.
            normed: ``norm1(x)``.
            next_norm: The norm that follows: of the next block, or the final one; None where none does.
            branch_scales: ``(2, B)``, multiplies each sample's attention and MLP branch.

        Returns:
            The new stream and ``next_norm`` of it, or the stream twice without one.
        """
        attn_scale, mlp_scale = (None, None) if branch_scales is None else branch_scales
        x, normed = self._add_norm(self.attn(normed), x, self.norm2, attn_scale)
        branch = self.mlp(normed)
        if next_norm is None:
            x = x + scale_branch(branch, mlp_scale)
            return x, x
        return self._add_norm(branch, x, next_norm, mlp_scale)

    def _add_norm(
        self, branch: Tensor, x: Tensor, norm: nn.LayerNorm, branch_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return add_layer_norm(
            branch, x, norm.weight, norm.bias, eps=norm.eps, branch_scale=branch_scale, impl=self.impl
        )


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    norm: nn.LayerNorm | None,
    branch_scales: Tensor | None = None,
    streams: list[Tensor] | None = None,
) -> Tensor:
    """Send ``x (B, N, dim)`` through pre-norm blocks and a final norm.

    Args:
        blocks: The blocks.
        x: The residual stream before them.
        norm: The final norm; None gives the stream as it is.
        branch_scales: ``(blocks, 2, B)``, as :func:`drop_path_scales` draws them.
        streams: Gets the residual stream after each block.
    """
    stack = cast(list[Block], list(blocks))
    norms = [block.norm1 for block in stack] + [norm]
    normed = x if norms[0] is None else norms[0](x)
    for index, block in enumerate(stack):
        scales = None if branch_scales is None else branch_scales[index]
        x, normed = block(x, normed, norms[index + 1], scales)
        if streams is not None:
            streams.append(x)
    return normed


def drop_path_scales(seeds: Tensor, rate: float, depth: int) -> Tensor:
    """Draw stochastic depth (Huang et al. 2016): the rate rises linearly from 0 in the first block to ``rate``.

    Args:
        seeds: ``(B,)`` int64. A sample's draws depend on its seed alone, never on its batch, rank or device.
        rate: Probability that the last block drops a branch, below 1.
        depth: Blocks.

    Returns:
        ``(depth, 2, B)`` float32: 0 where a sample drops the branch of attention or MLP, else 1 / (1 - rate).
    """
    rates = torch.linspace(0, rate, depth, device=seeds.device)[:, None, None]
    uniform = noise(seeds, 2 * depth).T.unflatten(0, (depth, 2)) / 2**32
    return (uniform >= rates) / (1 - rates)


def init_layers(module: nn.Module) -> None:
    """Initialise linear layers and convolutions Xavier-uniform with zero biases, and norms to 1 and 0, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()


class PatchProjection(nn.Module):
    """Holds the convolution that embeds patches, under timm's names; the encoder applies it to the visible ones.

    Args:
        in_channels: Channels of the spectrogram.
        embed_dim: Width of a token.
        grid: Where the patches lie.
    """

    def __init__(self, in_channels: int, embed_dim: int, grid: PatchGrid):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=grid.patch_size, stride=grid.patch_stride)


class Encoder(nn.Module):
    """Spectrogram in, tokens of the visible patches out, a class token first.

    Args:
        grid: The patch grid of the spectrograms.
        in_channels: Their channels.
        embed_dim: Width of a token, a multiple of 4.
        depth: Blocks.
        num_heads: Heads, which divide ``embed_dim``.
        mlp_ratio: Hidden width of the MLPs over ``embed_dim``.
        position_grid: Layout of the fixed positions, as in :func:`audiomae.positions.sincos_2d`.
        final_norm: End in a norm. Models that pool before it have none.
        impl: Form of the operators.

    Raises:
        ValueError: Sizes that do not go together.
    """

    def __init__(
        self,
        grid: PatchGrid,
        in_channels: int = 1,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        position_grid: str = "true",
        final_norm: bool = True,
        impl: str = "auto",
    ):
        super().__init__()
        self.grid = grid
        self.in_channels = in_channels
        self.impl = impl
        self.pos_embed: Tensor
        self.patch_embed = PatchProjection(in_channels, embed_dim, grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_2d(grid.shape, embed_dim, layout=position_grid))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, impl) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS) if final_norm else None

    @classmethod
    def from_config(cls, config: EncoderConfig, final_norm: bool = True, impl: str = "auto") -> Self:
        """Make the encoder of a configuration; arguments and errors as above."""
        return cls(
            config.grid,
            in_channels=config.in_channels,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            position_grid=config.position_grid,
            final_norm=final_norm,
            impl=impl,
        )

    def forward(self, spec: Tensor, mask: PatchMask | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """Encode the patches that a mask keeps.

        Args:
            spec: ``(B, in_channels, frames, mel bins)``.
            mask: Which patches to keep; None keeps all, in order.
            branch_scales: ``(depth, 2, B)``, stochastic depth as :func:`drop_path_scales` draws it.

        Returns:
            Tokens ``(B, 1 + K, embed_dim)`` after the final norm, if there is one, in the order of ``mask.ids_keep``.

        Raises:
            ValueError: A spectrogram of another shape.
        """
        return run_blocks(self.blocks, self._embed(spec, mask), self.norm, branch_scales)

    def hidden_states(self, spec: Tensor, mask: PatchMask | None = None) -> list[Tensor]:
        """Encode, and return the residual stream ``(B, 1 + K, embed_dim)`` after each block, before any final norm.

        Arguments and errors as in :meth:`forward`.
        """
        streams: list[Tensor] = []
        run_blocks(self.blocks, self._embed(spec, mask), None, streams=streams)
        return streams

    def _embed(self, spec: Tensor, mask: PatchMask | None) -> Tensor:
        """Tokens ``(B, 1 + K, embed_dim)`` before the first block."""
        expected = (self.in_channels, *self.grid.spec_size)
        if spec.dim() != 4 or spec.shape[1:] != expected:
            raise ValueError(
                f"spectrogram has shape {tuple(spec.shape)}, expected (B, {', '.join(map(str, expected))})"
            )
        if mask is None:
            ids_keep = torch.arange(self.grid.num_patches, device=spec.device).expand(spec.shape[0], -1)
        else:
            ids_keep = mask.ids_keep
        return patch_embed(
            spec,
            ids_keep,
            self.patch_embed.proj.weight,
            self.patch_embed.proj.bias,
            self.pos_embed[0],
            self.cls_token,
            stride=self.grid.patch_stride,
            impl=self.impl,
        )

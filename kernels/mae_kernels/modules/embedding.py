"""Both ends of the encoder: patches to tokens, and tokens to the decoder's input (He et al. 2022, section 3)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mae_kernels._checks import pair
from mae_kernels._forms import check_impl
from mae_kernels.modules._sizes import check_count, patch_grid, read_grid
from mae_kernels.modules._tables import Position, add_table, check_position, reset_table
from mae_kernels.ops.patch_embed import patch_embed
from mae_kernels.ops.restore_tokens import restore_tokens


class PatchProjection(nn.Conv2d):
    """Projection of patches that starts as MAE's: a Xavier-uniform matrix, and the bias of ``nn.Conv2d``."""

    def reset_parameters(self) -> None:
        """Initialise."""
        super().reset_parameters()
        bound = math.sqrt(6 / (self.weight[0].numel() + self.weight.shape[0]))
        nn.init.uniform_(self.weight, -bound, bound)


class VisiblePatchEmbed(nn.Module):
    """Tokens of the patches that a mask keeps, with positions and a class token in front.

    Parameters are named as in MAE and timm's ViT: ``proj.weight (D, C, ph, pw)``, ``proj.bias``, ``cls_token (1, 1,
    D)`` and ``pos_embed (1, [1 +] L, D)``, which is a buffer if it is fixed.

    Args:
        image_size: One int or ``(H, W)``.
        patch_size: One int or ``(ph, pw)``.
        dim: Width of a token, D; a multiple of 4 for ``"sincos"``.
        in_channels: Channels of the image, C.
        stride: Step between patches, at most the patch size; by default the patch size. Below it, patches overlap, and
            may leave a margin at the end, as those of a convolution.
        bias: The projection has a bias.
        position: ``"sincos"``: MAE's fixed 2-D sine-cosine embedding, 0 for the class token. ``"learned"``: starts
            N(0, 0.02), as timm's. None: no positions.
        cls_token: Put a class token in front; starts N(0, 0.02).
        device: Of the parameters.
        dtype: Of the parameters.
        impl: Form of the operator.

    Attributes:
        grid: Rows and columns of the patches.
        length: Patches, L.

    Raises:
        ValueError: Sizes that do not go together.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        dim: int,
        *,
        in_channels: int = 3,
        stride: int | Sequence[int] | None = None,
        bias: bool = True,
        position: Position | None = "sincos",
        cls_token: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        name = "VisiblePatchEmbed"
        check_impl(impl)
        check_count(name, "dim", dim)
        check_count(name, "in_channels", in_channels)
        self.image_size = pair(name, "image_size", image_size, minimum=1)
        self.patch_size = pair(name, "patch_size", patch_size, minimum=1)
        self.stride = self.patch_size if stride is None else pair(name, "stride", stride, minimum=1)
        self.grid = patch_grid(name, self.image_size, self.patch_size, self.stride)
        self.length = self.grid[0] * self.grid[1]
        check_position(name, position, self.grid, dim)
        self.in_channels, self.dim, self.position, self.impl = in_channels, dim, position, impl
        self.pos_embed: Tensor | None
        self.proj = PatchProjection(
            in_channels, dim, self.patch_size, stride=self.stride, bias=bias, device=device, dtype=dtype
        )
        if cls_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=dtype))
        else:
            self.register_parameter("cls_token", None)
        add_table(self, "pos_embed", position, self.length, dim, cls_token, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise class token and positions; the projection does so itself."""
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        reset_table(self.pos_embed, self.position, self.grid, self.cls_token is not None)

    def forward(self, image: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed.

        Args:
            image: ``(B, C, H, W)`` of the size that the module is made for.
            ids_keep: ``(B, K)`` int64 patch ids, row-major over the grid, which are not checked to lie on it; None
                takes all patches in order.

        Returns:
            Tokens ``(B, [1 +] K, D)`` in the order of ``ids_keep``.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape or device.
        """
        if image.dim() != 4 or image.shape[1:] != (self.in_channels, *self.image_size):
            expected = f"(B, {self.in_channels}, {self.image_size[0]}, {self.image_size[1]})"
            raise ValueError(f"VisiblePatchEmbed: image has shape {tuple(image.shape)}, expected {expected}")
        if ids_keep is None:
            ids_keep = torch.arange(self.length, device=image.device).expand(image.shape[0], -1)
        return patch_embed(
            image,
            ids_keep,
            self.proj.weight,
            self.proj.bias,
            None if self.pos_embed is None else self.pos_embed[0],
            self.cls_token,
            stride=self.stride,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Name the settings."""
        return (
            f"image_size={self.image_size}, grid={self.grid}, position={self.position!r}, "
            f"cls_token={self.cls_token is not None}, impl={self.impl!r}"
        )


class RestoreTokens(nn.Module):
    """The decoder's input: visible tokens back in their places, mask tokens elsewhere, positions added.

    Parameters are named as in MAE: ``mask_token (1, 1, D)``, which starts N(0, 0.02), and ``decoder_pos_embed (1, [1 +]
    L, D)`` with a row for the class token if the tokens have one, also where it is dropped. A fixed one is a buffer.

    Args:
        grid: Patches, as rows and columns, or as their number, which is not enough for ``"sincos"``.
        dim: Width of a token, D; a multiple of 4 for ``"sincos"``.
        position: As for :class:`VisiblePatchEmbed`.
        has_cls: The tokens start with a class token.
        keep_cls: The result starts with it too; otherwise it is dropped, as in Audio-MAE's local decoder.
        device: Of the parameters.
        dtype: Of the parameters.
        impl: Form of the operator.

    Attributes:
        grid: Rows and columns of the patches, None where only their number is known.
        length: Patches, L.

    Raises:
        ValueError: Sizes that do not go together; ``keep_cls`` without ``has_cls``.
    """

    def __init__(
        self,
        grid: int | Sequence[int],
        dim: int,
        *,
        position: Position | None = "sincos",
        has_cls: bool = True,
        keep_cls: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        name = "RestoreTokens"
        check_impl(impl)
        check_count(name, "dim", dim)
        self.grid, self.length = read_grid(name, grid)
        check_position(name, position, self.grid, dim)
        if keep_cls and not has_cls:
            raise ValueError(f"{name}: keep_cls is True with has_cls False, expected tokens with a class token")
        self.dim, self.position, self.impl = dim, position, impl
        self.has_cls, self.keep_cls = has_cls, keep_cls
        self.decoder_pos_embed: Tensor | None
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=dtype))
        add_table(self, "decoder_pos_embed", position, self.length, dim, has_cls, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise."""
        nn.init.normal_(self.mask_token, std=0.02)
        reset_table(self.decoder_pos_embed, self.position, self.grid, self.has_cls)

    def forward(self, tokens: Tensor, ids_restore: Tensor) -> Tensor:
        """Restore.

        Args:
            tokens: ``(B, [1 +] K, D)`` of the kept patches, in the order of the mask's ``ids_keep``.
            ids_restore: ``(B, L)`` int64, the place of each patch in ``[kept, removed]``, which is not checked.

        Returns:
            ``(B, [1 +] L, D)``, row-major.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape or device.
        """
        if ids_restore.dim() != 2 or ids_restore.shape[1] != self.length:
            raise ValueError(
                f"RestoreTokens: ids_restore has shape {tuple(ids_restore.shape)}, expected (B, {self.length})"
            )
        return restore_tokens(
            tokens,
            ids_restore,
            self.mask_token,
            None if self.decoder_pos_embed is None else self.decoder_pos_embed[0],
            has_cls=self.has_cls,
            keep_cls=self.keep_cls,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Name the settings."""
        return (
            f"grid={self.grid or self.length}, dim={self.dim}, position={self.position!r}, has_cls={self.has_cls}, "
            f"keep_cls={self.keep_cls}, impl={self.impl!r}"
        )

"""Image MAE as its users keep it: the shape of ``MaskedAutoencoderViT`` (He et al. 2022), in plain PyTorch and timm.

Names, signatures and mathematics are the published model's, so that what holds for this class holds for theirs.
"""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block, PatchEmbed
from torch import Tensor, nn

from audiomae.positions import sincos_2d


def draw_mask(x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a random part of the tokens ``x (N, L, D)``: those of smallest noise.

    Returns:
        The kept tokens; the mask ``(N, L)``, 1 where removed; and ``ids_restore (N, L)``.
    """
    batch, length, dim = x.shape
    keep = int(length * (1 - mask_ratio))
    ids_shuffle = torch.rand(batch, length, device=x.device).argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, dim))
    mask = torch.ones(batch, length, device=x.device)
    mask[:, :keep] = 0
    return kept, mask.gather(1, ids_restore), ids_restore


def insert_mask_tokens(x: Tensor, mask_token: Tensor, ids_restore: Tensor) -> Tensor:
    """Put the kept tokens of ``x (N, 1 + K, D)`` back in their places among mask tokens, the class token first."""
    batch, length = ids_restore.shape
    masked = mask_token.expand(batch, length + 1 - x.shape[1], -1)
    restored = torch.cat([x[:, 1:], masked], dim=1).gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :1], restored], dim=1)


def cut_patches(imgs: Tensor, side: int) -> Tensor:
    """Cut images ``(N, C, H, W)`` into ``(N, L, side * side * C)``, the channel fastest."""
    patches = imgs.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
    return patches.flatten(3).flatten(1, 2)


def score(pred: Tensor, target: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """Mean squared error over the removed patches."""
    if normalize:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    error = (pred - target).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def initialize(model: nn.Module, grid: tuple[int, int]) -> None:
    """Start from fixed positions, Xavier-uniform weights, and class and mask tokens of deviation 0.02."""
    for table in (model.pos_embed, model.decoder_pos_embed):
        table.data.copy_(sincos_2d(grid, table.shape[2]))
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.data.flatten(1))
    nn.init.normal_(model.cls_token, std=0.02)
    nn.init.normal_(model.mask_token, std=0.02)


class MaskedAutoencoderViT(nn.Module):
    """Masked autoencoder of square images.

    Args:
        img_size: Side of the image.
        patch_size: Side of a patch.
        in_chans: Channels.
        embed_dim: Width of the encoder.
        depth: Its blocks.
        num_heads: Its heads.
        decoder_embed_dim: Width of the decoder.
        decoder_depth: Its blocks.
        decoder_num_heads: Its heads.
        mlp_ratio: Hidden width of an MLP over the width.
        norm_layer: Makes a norm from a width.
        norm_pix_loss: Normalise each target patch.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        norm_pix_loss: bool = False,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        length = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, length + 1, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, length + 1, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.norm_pix_loss = norm_pix_loss
        initialize(self, self.patch_embed.grid_size)

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut images ``(N, C, H, W)`` into targets ``(N, L, patch_size**2 * C)``."""
        return cut_patches(imgs, self.patch_embed.patch_size[0])

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Keep a random part of the tokens."""
        return draw_mask(x, mask_ratio)

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the visible patches of images, as ``(N, 1 + K, D)``, with mask and ids_restore."""
        x = self.patch_embed(x)
        x = x + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict all patches, ``(N, L, patch_size**2 * C)``."""
        x = insert_mask_tokens(self.decoder_embed(x), self.mask_token, ids_restore)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Score the predictions of the removed patches."""
        return score(pred, self.patchify(imgs), mask, self.norm_pix_loss)

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct images, as loss, predictions and mask."""
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

"""Audio-MAE as its users keep it: the shape of the released ``MaskedAutoencoderViT`` (Huang et al. 2022).

The class has the name of image MAE's, as there, and so a file of its own.
"""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from audiomae.decoder import LocalBlock
from bench.mae_models import cut_patches, draw_mask, initialize, insert_mask_tokens, score


class PatchEmbed(nn.Module):
    """Project the patches of a spectrogram, which overlap where the stride is below the patch.

    Args:
        img_size: Frames and mels.
        patch_size: Side of a patch.
        in_chans: Channels.
        embed_dim: Width of a token.
        stride: Step between patches.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, stride: int):
        super().__init__()
        self.img_size = img_size
        self.patch_size = (patch_size, patch_size)
        self.patch_hw = tuple((size - patch_size) // stride + 1 for size in img_size)
        self.num_patches = self.patch_hw[0] * self.patch_hw[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Embed spectrograms as ``(N, L, D)``."""
        return self.proj(x).flatten(2).transpose(1, 2)


class MaskedAutoencoderViT(nn.Module):
    """Masked autoencoder of spectrograms.

    Args:
        img_size: Frames and mels.
        patch_size: Side of a patch.
        stride: Step between patches where ``use_custom_patch``.
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
        use_custom_patch: Patches overlap.
        decoder_mode: 0: attention over all tokens. 1: in windows of 4 x 4, every second block shifted by (2, 0).
        mask_t_prob: Part of the time that is removed where ``mask_2d``.
        mask_f_prob: Part of the mels.
        mask_2d: Remove whole frames and mels.
        epoch: Of the training.
    """

    def __init__(
        self,
        img_size: tuple[int, int] = (1024, 128),
        patch_size: int = 16,
        stride: int = 10,
        in_chans: int = 1,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        norm_pix_loss: bool = False,
        use_custom_patch: bool = False,
        decoder_mode: int = 0,
        mask_t_prob: float = 0.6,
        mask_f_prob: float = 0.5,
        mask_2d: bool = False,
        epoch: int = 0,
    ):
        super().__init__()
        self.stride = stride if use_custom_patch else patch_size
        self.patch_size = patch_size
        self.use_custom_patch = use_custom_patch
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, self.stride)
        grid, length = self.patch_embed.patch_hw, self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, length + 1, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, length + 1, decoder_embed_dim), requires_grad=False)
        self.decoder_mode = decoder_mode
        if decoder_mode == 1:
            self.decoder_blocks = nn.ModuleList(
                LocalBlock(
                    decoder_embed_dim,
                    decoder_num_heads,
                    grid,
                    window=(4, 4),
                    shift=(2, 0) if index % 2 else (0, 0),
                    mlp_ratio=mlp_ratio,
                    impl="reference",
                )
                for index in range(decoder_depth)
            )
        else:
            self.decoder_blocks = nn.ModuleList(
                Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
                for _ in range(decoder_depth)
            )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.norm_pix_loss = norm_pix_loss
        self.mask_t_prob = mask_t_prob
        self.mask_f_prob = mask_f_prob
        self.mask_2d = mask_2d
        self.epoch = epoch
        initialize(self, grid)

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut spectrograms ``(N, C, T, F)`` into targets ``(N, L, patch_size**2 * C)``."""
        if not self.use_custom_patch:
            return cut_patches(imgs, self.patch_size)
        patches = imgs.unfold(2, self.patch_size, self.stride).unfold(3, self.patch_size, self.stride)
        return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Keep a random part of the tokens."""
        return draw_mask(x, mask_ratio)

    def random_masking_2d(self, x: Tensor, mask_t_prob: float, mask_f_prob: float) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the tokens in a random part of the frames and of the mels."""
        removed, kept = [], []
        for size, ratio in zip(self.patch_embed.patch_hw, (mask_t_prob, mask_f_prob), strict=True):
            kept.append(int(size * (1 - ratio)))
            rank = torch.rand(x.shape[0], size, device=x.device).argsort(dim=1).argsort(dim=1)
            removed.append(rank >= kept[-1])
        mask = (removed[0][:, :, None] | removed[1][:, None, :]).flatten(1).float()
        ids_shuffle = mask.argsort(dim=1, stable=True)
        ids_keep = ids_shuffle[:, : kept[0] * kept[1], None]
        return x.gather(1, ids_keep.expand(-1, -1, x.shape[2])), mask, ids_shuffle.argsort(dim=1)

    def forward_encoder(
        self, x: Tensor, mask_ratio: float, mask_2d: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Encode the visible patches, as ``(N, 1 + K, D)``, with mask, ids_restore and what nothing fills."""
        x = self.patch_embed(x)
        x = x + self.pos_embed[:, 1:]
        if mask_2d:
            x, mask, ids_restore = self.random_masking_2d(x, self.mask_t_prob, self.mask_f_prob)
        else:
            x, mask, ids_restore = self.random_masking(x, mask_ratio)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore, None

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> tuple[Tensor, None, None]:
        """Predict all patches, ``(N, L, patch_size**2 * C)``, with two things that nothing fills."""
        x = insert_mask_tokens(self.decoder_embed(x), self.mask_token, ids_restore)
        x = x + self.decoder_pos_embed
        if self.decoder_mode != 0:
            x = x[:, 1:]
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))
        return pred if self.decoder_mode != 0 else pred[:, 1:], None, None

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, norm_pix_loss: bool = False) -> Tensor:
        """Score the predictions of the removed patches."""
        return score(pred, self.patchify(imgs), mask, norm_pix_loss)

    def forward(self, imgs: Tensor, mask_ratio: float = 0.8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reconstruct spectrograms, as loss, predictions, mask and a second loss, which is 0."""
        latent, mask, ids_restore, _ = self.forward_encoder(imgs, mask_ratio, mask_2d=self.mask_2d)
        pred, _, _ = self.forward_decoder(latent, ids_restore)
        loss = self.forward_loss(imgs, pred, mask, norm_pix_loss=self.norm_pix_loss)
        return loss, pred, mask, torch.zeros(1, device=imgs.device)

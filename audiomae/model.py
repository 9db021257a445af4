"""Audio-MAE: a masked autoencoder of spectrograms ("Masked Autoencoders that Listen", arXiv 2207.06405)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from mae_kernels import check_impl, linear_masked_mse, masked_mse
from torch import Tensor, nn

from audiomae.config import EncoderConfig
from audiomae.decoder import Decoder, DecoderKind
from audiomae.embedding import Embedding, embed
from audiomae.encoder import Encoder, init_layers
from audiomae.hub import HubModel
from audiomae.masking import PatchMask

TARGET_EPS = 1e-6


@dataclass(frozen=True)
class AudioMAEConfig(EncoderConfig):
    """Architecture of an :class:`AudioMAE`. The defaults are the paper's: ViT-B with a local decoder.

    Attributes:
        decoder: Attention of the decoder: shifted windows, windows then global, or global.
        decoder_dim: Width of the decoder's tokens.
        decoder_depth: Blocks of the decoder, all counted; None is 16 for local, 12 for hybrid, 8 for global.
        decoder_heads: Heads of the decoder.
        window: Tokens a window along time and frequency.
        shift: Cyclic shift of every second local block along time and frequency.
        hybrid_global_layers: Global blocks that end a hybrid decoder.
        bias_dropout: Dropout of the position bias in training; 0.1 in the released code.
        norm_target: Normalise each target patch by its own mean and variance.
    """

    decoder: DecoderKind = "local"
    decoder_dim: int = 512
    decoder_depth: int | None = None
    decoder_heads: int = 16
    window: tuple[int, int] = (4, 4)
    shift: tuple[int, int] = (2, 0)
    hybrid_global_layers: int = 4
    bias_dropout: float = 0.0
    norm_target: bool = True

    def __post_init__(self) -> None:
        """Check what is true of single settings; sizes are checked against each other where they meet."""
        super().__post_init__()
        self.check_positive("decoder_dim", "decoder_depth", "decoder_heads")
        if not 0 <= self.bias_dropout < 1:
            raise ValueError(f"bias_dropout is {self.bias_dropout}, expected 0 up to but not 1")
        for axis, window, shift in zip(("time", "frequency"), self.window, self.shift, strict=True):
            if window < 1 or shift < 0:
                raise ValueError(f"window and shift are {window} and {shift} in {axis}, expected at least 1 and 0")


class MAEOutput(NamedTuple):
    """What :class:`AudioMAE` returns.

    Attributes:
        loss: Mean squared error over the removed patches, a scalar.
        pred: Predictions ``(B, L, patch frames * patch bins * channels)`` of all patches, normalised if the targets
            are; None unless asked for.
        mask: ``(B, L)`` bool, True where removed.
    """

    loss: Tensor
    pred: Tensor | None
    mask: Tensor


class AudioMAE(nn.Module, HubModel, pipeline_tag="feature-extraction"):
    """Masked autoencoder: encodes the visible patches of a spectrogram and predicts the removed ones.

    Args:
        config: The architecture.
        impl: Form of the operators: ``"reference"`` is plain PyTorch as published code has it; ``"auto"`` takes the
            fastest form at hand.

    Raises:
        ValueError: Sizes that do not go together, or an unknown ``impl``.
    """

    config_class = AudioMAEConfig

    def __init__(self, config: AudioMAEConfig | None = None, impl: str = "auto"):
        super().__init__()
        check_impl(impl)
        self.config = self._hub_mixin_config = config = config or AudioMAEConfig()
        self.impl = impl
        self.grid = config.grid
        self.encoder = Encoder.from_config(config, impl=impl)
        self.decoder = Decoder(
            self.grid,
            values=config.in_channels * config.patch_size[0] * config.patch_size[1],
            encoder_dim=config.embed_dim,
            kind=config.decoder,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
            mlp_ratio=config.mlp_ratio,
            window=config.window,
            shift=config.shift,
            global_layers=config.hybrid_global_layers,
            bias_dropout=config.bias_dropout,
            position_grid=config.position_grid,
            impl=impl,
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published: Xavier-uniform weights, zero biases, unit norms and temperatures, small tokens."""
        init_layers(self)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    def forward(
        self,
        spec: Tensor,
        mask: PatchMask | None = None,
        mask_ratio: float = 0.8,
        seeds: Tensor | None = None,
        return_pred: bool = False,
    ) -> MAEOutput:
        """Compute the pre-training loss.

        Args:
            spec: Normalised spectrograms ``(B, in_channels, frames, mel bins)``.
            mask: Which patches to remove. None draws a random mask.
            mask_ratio: Share of patches to remove where the mask is drawn.
            seeds: ``(B,)`` int64, one for each row's mask; None draws them from PyTorch's generator.
            return_pred: Also predict all patches, the visible ones included.

        Raises:
            ValueError: A wrong shape, or a ratio that keeps or removes nothing.
        """
        if mask is None:
            if seeds is None:
                seeds = torch.randint(2**63 - 1, spec.shape[:1], device=spec.device)
            mask = PatchMask.random(seeds, self.grid, mask_ratio, impl=self.impl)
        hidden = self.decoder(self.encoder(spec, mask), mask)
        head = self.decoder.pred
        if return_pred:
            pred = head(hidden)
            return MAEOutput(masked_mse(pred, spec, mask.ids_removed, **self._target()), pred, mask.mask)
        loss = linear_masked_mse(hidden, head.weight, head.bias, spec, mask.ids_removed, **self._target())
        return MAEOutput(loss, None, mask.mask)

    def _target(self) -> dict[str, Any]:
        """What the loss compares with."""
        return {
            "patch_size": self.grid.patch_size,
            "stride": self.grid.patch_stride,
            "normalize": self.config.norm_target,
            "eps": TARGET_EPS,
            "impl": self.impl,
        }

    @torch.no_grad()
    def baseline_loss(self, spec: Tensor, mask: PatchMask) -> Tensor:
        """Score the prediction of every removed patch's own mean: what a model that has learnt nothing can reach.

        With normalised targets this is (n - 1) / n for patches of n values, less where patches are constant.

        Args:
            spec: ``(B, in_channels, frames, mel bins)``.
            mask: Which patches are removed.

        Returns:
            The loss, a scalar.
        """
        patches = self.grid.patchify(spec)
        pred = torch.zeros_like(patches)
        if not self.config.norm_target:
            pred += patches.mean(dim=-1, keepdim=True)
        return masked_mse(pred, spec, mask.ids_removed, **self._target())

    @torch.no_grad()
    def reconstruct(self, spec: Tensor, output: MAEOutput) -> Tensor:
        """Put predictions into the removed patches of a spectrogram; what no removed patch covers stays as it is.

        Where patches overlap, the mean of all that cover a value is taken. Normalised predictions get back the mean
        and deviation of the patch that they stand for, as MAE's figures do.

        Args:
            spec: The input ``(B, in_channels, frames, mel bins)``.
            output: Of this model on it, with ``return_pred=True``.

        Returns:
            ``(B, in_channels, frames, mel bins)`` in the dtype of ``spec``.

        Raises:
            ValueError: The output holds no predictions.
        """
        if output.pred is None:
            raise ValueError("output holds no predictions, expected that of a call with return_pred=True")
        patches, pred = self.grid.patchify(spec), output.pred.to(spec.dtype)
        if self.config.norm_target:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            pred = pred * (variance + TARGET_EPS).sqrt() + mean
        restored = self.grid.unpatchify(torch.where(output.mask[..., None], pred, patches))
        removed = self.grid.unpatchify(output.mask[..., None].to(spec.dtype).expand_as(patches)) > 0
        return torch.where(removed, restored, spec)

    def embed(
        self, waveform: Tensor | np.ndarray, sample_rate: int, *, layer: int | None = None, batch_size: int = 16
    ) -> Embedding:
        """Embed audio of any length and sample rate; all as for :func:`audiomae.embedding.embed`."""
        return embed(self.config, self.encoder, waveform, sample_rate, layer=layer, batch_size=batch_size)

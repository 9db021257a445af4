"""The fine-tuned model: the encoder, the mean of its patch tokens, a norm and a linear head (arXiv 2207.06405, 3.3)."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from mae_kernels import check_impl
from torch import Tensor, nn

from audiomae.config import EncoderConfig
from audiomae.embedding import Embedding, embed
from audiomae.encoder import LAYER_NORM_EPS, Encoder, drop_path_scales, init_layers
from audiomae.hub import HubModel
from audiomae.masking import PatchMask

HEAD_STD = 2e-5
"""Deviation of a new head's weights: it starts with scores of almost 0, as published fine-tuning does."""


@dataclass(frozen=True)
class AudioClassifierConfig(EncoderConfig):
    """Architecture of an :class:`AudioClassifier`, and what its scores mean.

    Attributes:
        num_classes: Classes.
        labels: A name for each class, in order; empty where they are not known.
        multi_label: A clip can be of several classes.
        activation: Turns logits into probabilities: that of the loss that the model was trained with.
        drop_path: Stochastic depth in training: the probability that the last block drops a branch.
    """

    num_classes: int = 527
    labels: tuple[str, ...] = ()
    multi_label: bool = True
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        """Check what is true of single settings."""
        super().__post_init__()
        self.check_positive("num_classes")
        if self.labels and len(self.labels) != self.num_classes:
            raise ValueError(f"{len(self.labels)} labels for {self.num_classes} classes, expected one for each or none")
        if self.activation not in ("sigmoid", "softmax"):
            raise ValueError(f"activation is {self.activation!r}, expected 'sigmoid' or 'softmax'")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}, expected 0 up to but not 1")


class AudioClassifier(nn.Module, HubModel, pipeline_tag="audio-classification"):
    """Classifies spectrograms. In training, masking drops tokens before the encoder and stochastic depth its branches.

    Args:
        config: The architecture.
        impl: Form of the operators, as for :class:`audiomae.AudioMAE`.

    Raises:
        ValueError: Sizes that do not go together, or an unknown ``impl``.
    """

    config_class = AudioClassifierConfig

    def __init__(self, config: AudioClassifierConfig | None = None, impl: str = "auto"):
        super().__init__()
        check_impl(impl)
        self.config = self._hub_mixin_config = config = config or AudioClassifierConfig()
        self.impl = impl
        self.grid = config.grid
        # Pooling comes before the norm, so the encoder has none of its own.
        self.encoder = Encoder.from_config(config, final_norm=False, impl=impl)
        self.fc_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.embed_dim, config.num_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published: the encoder as in pre-training, and a head whose scores are almost 0."""
        init_layers(self)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)

    def forward(self, spec: Tensor, mask: PatchMask | None = None, seeds: Tensor | None = None) -> Tensor:
        """Compute the logits of all classes.

        Args:
            spec: Normalised spectrograms ``(B, in_channels, frames, mel bins)``.
            mask: Which patches to drop; None keeps all.
            seeds: ``(B,)`` int64 for stochastic depth in training; None draws them from PyTorch's generator.

        Returns:
            ``(B, num_classes)``.

        Raises:
            ValueError: A spectrogram of another shape.
        """
        pooled = self.pool(spec, mask, seeds)
        # Not in autocast's dtype: with 8 bits many scores would be equal, and metrics rank clips by them.
        device = spec.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return self.head(pooled.to(self.head.weight.dtype))

    def pool(self, spec: Tensor, mask: PatchMask | None = None, seeds: Tensor | None = None) -> Tensor:
        """Encode and pool: the input of the head, ``(B, embed_dim)``. Arguments and errors as in :meth:`forward`."""
        branch_scales = None
        if self.training and self.config.drop_path > 0:
            if seeds is None:
                seeds = torch.randint(2**63 - 1, spec.shape[:1], device=spec.device)
            branch_scales = drop_path_scales(seeds, self.config.drop_path, self.config.depth)
        tokens = self.encoder(spec, mask, branch_scales)
        return self.fc_norm(tokens[:, 1:].mean(dim=1))

    def scores(self, logits: Tensor) -> Tensor:
        """Turn logits ``(B, num_classes)`` into probabilities, float32."""
        return logits.float().sigmoid() if self.config.activation == "sigmoid" else logits.float().softmax(dim=-1)

    def embed(
        self, waveform: Tensor | np.ndarray, sample_rate: int, *, layer: int | None = None, batch_size: int = 16
    ) -> Embedding:
        """Embed audio of any length and sample rate; all as for :func:`audiomae.embedding.embed`.

        ``model.head(model.fc_norm(embedding.clip))`` are the logits of a clip that fills the model's input.
        """
        return embed(self.config, self.encoder, waveform, sample_rate, layer=layer, batch_size=batch_size)

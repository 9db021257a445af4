"""Small models whose every value is away from its initial one, which may hide what it does."""

from typing import Any, TypeVar

import torch
from torch import nn

from audiomae import AudioClassifier, AudioClassifierConfig, AudioMAE, AudioMAEConfig

M = TypeVar("M", bound=nn.Module)

ENCODER: dict[str, Any] = {"spec_size": (64, 128), "embed_dim": 192, "depth": 2, "num_heads": 3}
DECODER: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


@torch.no_grad()
def randomized(model: M) -> M:
    for tensor in model.state_dict().values():
        tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model.eval()


def pretrained(impl: str = "auto", **settings: Any) -> AudioMAE:
    return randomized(AudioMAE(AudioMAEConfig(**{**ENCODER, **DECODER, **settings}), impl))


def classifier(impl: str = "auto", **settings: Any) -> AudioClassifier:
    return randomized(AudioClassifier(AudioClassifierConfig(**{**ENCODER, "num_classes": 5, **settings}), impl))

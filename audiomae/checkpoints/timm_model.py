"""Our encoders as timm's: a ``VisionTransformer`` that computes the same, and the names of its parameters."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn

from audiomae.checkpoints import names
from audiomae.classifier import AudioClassifier, AudioClassifierConfig
from audiomae.encoder import LAYER_NORM_EPS
from audiomae.model import AudioMAE

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

T = TypeVar("T")


@overload
def to_timm(weights: AudioMAE | AudioClassifier) -> "VisionTransformer": ...


@overload
def to_timm(weights: Mapping[str, T]) -> dict[str, T]: ...


def to_timm(weights: AudioMAE | AudioClassifier | Mapping[str, Any]) -> "VisionTransformer | dict[str, Any]":
    """Make a timm ``VisionTransformer`` of a model, or rename a dictionary to the names of its parameters.

    An :class:`audiomae.AudioMAE` gives one without a head, which returns all tokens ``(B, 1 + L, embed_dim)`` after the
    final norm; an :class:`audiomae.AudioClassifier` one that returns the same logits. Tensors are copied with their
    dtype and device. The position table is a parameter there, as timm has it. Its state dictionary, saved by
    ``torch.save`` or safetensors, is a file that :mod:`audiomae.checkpoints` loads.

    Args:
        weights: A model; or values by our names, any part of a model, as for :func:`audiomae.checkpoints.to_official`.
            Leaves out ``decoder.*``, which timm has not.

    Raises:
        TypeError: Neither a model nor a dictionary.
        ValueError: Patches that overlap, which timm has not, or a name that is not one of ours.
    """
    if isinstance(weights, Mapping):
        return names.to_timm(weights)
    if not isinstance(weights, AudioMAE | AudioClassifier):
        raise TypeError(
            f"weights are {type(weights).__name__}, expected AudioMAE, AudioClassifier or a dictionary by name"
        )
    config, state = weights.config, weights.state_dict()
    if config.patch_stride != config.patch_size:
        raise ValueError(
            f"patch_stride is {config.patch_stride}, expected patch_size {config.patch_size}: "
            "timm's VisionTransformer has no patches that overlap"
        )
    classifier = config if isinstance(config, AudioClassifierConfig) else None
    from timm.models.vision_transformer import VisionTransformer  # it takes seconds

    with torch.random.fork_rng(devices=[]):  # for initial values that are replaced
        model = VisionTransformer(
            img_size=config.spec_size,
            patch_size=config.patch_size,
            in_chans=config.in_channels,
            num_classes=classifier.num_classes if classifier else 0,
            global_pool="avg" if classifier else "",
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
            drop_path_rate=classifier.drop_path if classifier else 0.0,
            weight_init="skip",
        )
    own = {name: tensor for name, tensor in state.items() if names.is_classifier(name)}
    encoder = names.to_timm({name: tensor for name, tensor in state.items() if name not in own})
    copies = {name: tensor.detach().clone() for name, tensor in (encoder | own).items()}
    model.load_state_dict(copies, assign=True)
    return model.train(weights.training)

"""Saving: native weights, and files for the official code."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from audiomae.atomic import replacing
from audiomae.checkpoints.files import NATIVE_CONFIG, NATIVE_METADATA, NATIVE_MODEL
from audiomae.checkpoints.names import is_classifier, to_official
from audiomae.checkpoints.shapes import check_state
from audiomae.classifier import AudioClassifier
from audiomae.config import EncoderConfig
from audiomae.model import AudioMAE

Weights = AudioMAE | AudioClassifier | tuple[EncoderConfig, dict[str, Tensor]]
"""A model, or a configuration and tensors, as :func:`audiomae.checkpoints.load` returns them."""


def save_weights(path: str | Path, weights: Weights) -> None:
    """Save weights and configuration natively, as safetensors. A crash leaves the old file or the new one.

    Args:
        path: The file, by custom with the suffix ``.safetensors``.
        weights: A model, or a configuration and its state dictionary, of the encoder alone or of all.

    Raises:
        FileNotFoundError: No such directory.
        CheckpointError: Tensors that do not fit the configuration.
    """
    config, state = _checked(weights)
    metadata = {"format": "pt", NATIVE_METADATA: json.dumps(config.to_dict())}
    with replacing(Path(path)) as temporary:
        # safetensors' own save_file makes a file that only its owner can read.
        temporary.write_bytes(save(state, metadata))


def save_official(path: str | Path, weights: Weights) -> None:
    """Save weights under the names and in the layout of the official code, which then loads them strictly.

    The configuration lies next to them, where that code does not look, so that :func:`audiomae.checkpoints.load`
    need not infer it.

    Args:
        path: The file, by custom with the suffix ``.pth``.
        weights: As for :func:`save_weights`.

    Raises:
        FileNotFoundError: No such directory.
        CheckpointError: Tensors that do not fit the configuration.
    """
    config, state = _checked(weights)
    with replacing(Path(path)) as temporary:
        # A classifier's own tensors have the same names in both.
        own = {name: tensor for name, tensor in state.items() if is_classifier(name)}
        official = to_official({name: tensor for name, tensor in state.items() if name not in own}) | own
        torch.save({NATIVE_MODEL: official, NATIVE_CONFIG: config.to_dict()}, temporary)


def _checked(weights: Weights) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Check the weights, and copy them: a tensor that is a view would be written with all that lies behind it."""
    config, state = (weights.config, weights.state_dict()) if isinstance(weights, nn.Module) else weights
    check_state(config, state)
    return config, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}

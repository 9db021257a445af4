"""Configurations and tensors: infer the one from the shapes of the other, and check that both agree."""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from audiomae.checkpoints.files import CheckpointError
from audiomae.checkpoints.fitting import check_kinds, check_model
from audiomae.classifier import AudioClassifier, AudioClassifierConfig
from audiomae.config import ENCODER_SIZES, EncoderConfig
from audiomae.encoder import Encoder
from audiomae.grid import PatchGrid
from audiomae.model import AudioMAE, AudioMAEConfig
from audiomae.positions import sincos_2d

MEL_BINS = 128
HEAD_DIM = 64
NUM_HEADS = {embed_dim: num_heads for embed_dim, _, num_heads in ENCODER_SIZES.values()}
# Wide enough for a table stored in bfloat16, and far below the distance between the layouts.
POSITION_TOLERANCE = 1e-2


def has_decoder(state: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors under our names include any of a decoder."""
    return any(name.startswith("decoder.") for name in state)


def build_model(config: EncoderConfig, impl: str = "auto") -> AudioMAE | AudioClassifier:
    """Make the model of a configuration.

    Raises:
        ValueError: Sizes that do not go together, or the configuration of an encoder alone.
    """
    if isinstance(config, AudioClassifierConfig):
        return AudioClassifier(config, impl)
    if isinstance(config, AudioMAEConfig):
        return AudioMAE(config, impl)
    raise ValueError(f"{type(config).__name__} makes no model, expected AudioMAEConfig or AudioClassifierConfig")


def infer_config(state: Mapping[str, Tensor]) -> AudioMAEConfig:
    """Infer a configuration from tensors under our names, for files that store none.

    Shapes do not tell everything. The encoder gets the heads of the published size of its width, or one for each 64
    channels; a global decoder's heads, windows and shifts are the defaults; patches do not overlap. One channel is
    taken for a spectrogram of 128 mel bins where the number of positions allows it, three for a square image. Without a
    decoder, its settings are the defaults.

    Args:
        state: Tensors of a whole model or of an encoder.

    Raises:
        ValueError: Tensors that are not those of a Vision Transformer, or that leave a setting open.
    """
    embed_dim, in_channels, *sides = _shape(state, "encoder.patch_embed.proj.weight", 4)
    hidden_dim, _ = _shape(state, "encoder.blocks.0.mlp.fc1.weight", 2)
    _, positions, _ = _shape(state, "encoder.pos_embed", 3)
    if embed_dim not in NUM_HEADS and embed_dim % HEAD_DIM:
        raise CheckpointError(
            f"a width of {embed_dim} leaves the number of heads open, "
            f"expected {', '.join(map(str, NUM_HEADS))} or a multiple of {HEAD_DIM}"
        )
    patch_size = (sides[0], sides[1])
    grid = PatchGrid(_infer_spec_size(positions - 1, patch_size, in_channels), patch_size, patch_size)
    return AudioMAEConfig(
        spec_size=grid.spec_size,
        patch_size=patch_size,
        patch_stride=patch_size,
        in_channels=in_channels,
        embed_dim=embed_dim,
        depth=_count_blocks(state, "encoder"),
        num_heads=NUM_HEADS.get(embed_dim, embed_dim // HEAD_DIM),
        mlp_ratio=hidden_dim / embed_dim,
        position_grid="official" if _has_official_positions(state["encoder.pos_embed"], grid) else "true",
        **(_infer_decoder(state) if has_decoder(state) else {}),
    )


def check_state(config: EncoderConfig, state: Mapping[str, Tensor]) -> None:
    """Check that tensors under our names are those of a configuration's model, or of a pre-trained encoder alone.

    An encoder alone may lack its final norm: fine-tuning pools before it and drops it.

    Raises:
        ValueError: Missing or unknown tensors, wrong shapes, tensors of another kind than weights, or a configuration
            that makes no model.
    """
    check_kinds(state)
    if not isinstance(config, AudioMAEConfig) or has_decoder(state):
        check_model(partial(build_model, config), config, state)
        return
    encoder = EncoderConfig(**config.encoder_settings())
    final_norm = any(name.startswith("encoder.norm.") for name in state)
    check_model(lambda: nn.ModuleDict({"encoder": Encoder.from_config(encoder, final_norm)}), encoder, state)


def _shape(state: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"no {name} among the tensors, expected those of a Vision Transformer")
    if state[name].dim() != dims:
        raise CheckpointError(f"{name} has shape {tuple(state[name].shape)}, expected {dims} dimensions")
    return tuple(state[name].shape)


def _count_blocks(state: Mapping[str, Tensor], part: str) -> int:
    return len({match[0] for name in state if (match := re.match(rf"{part}\.blocks\.\d+\.", name))})


def _infer_spec_size(length: int, patch_size: tuple[int, int], in_channels: int) -> tuple[int, int]:
    """Find the input of ``length`` patches."""
    side = math.isqrt(length)
    square = (side * patch_size[0], side * patch_size[1]) if side * side == length else None
    columns = MEL_BINS // patch_size[1]
    fits = columns * patch_size[1] == MEL_BINS and length % columns == 0
    audio = (length // columns * patch_size[0], MEL_BINS) if fits else None
    spec_size = square or audio if in_channels == 3 else audio or square
    if spec_size is None:
        raise CheckpointError(
            f"{length} positions of patches {patch_size} without overlap fit neither {MEL_BINS} mel bins nor a square"
        )
    return spec_size


def _has_official_positions(table: Tensor, grid: PatchGrid) -> bool:
    def equals(layout: str) -> bool:
        fixed = sincos_2d(grid.shape, table.shape[-1], layout=layout)
        return table.shape == fixed.shape and torch.allclose(table.float(), fixed, rtol=0, atol=POSITION_TOLERANCE)

    return equals("official") and not equals("true")


def _infer_decoder(state: Mapping[str, Tensor]) -> dict[str, Any]:
    decoder_dim, _ = _shape(state, "decoder.embed.weight", 2)
    depth = _count_blocks(state, "decoder")
    local = [index for index in range(depth) if f"decoder.blocks.{index}.attn.tau" in state]
    if local != list(range(len(local))):
        raise CheckpointError(f"decoder blocks {local} of {depth} have attn.tau, expected the first ones")
    kind = "global" if not local else "local" if len(local) == depth else "hybrid"
    settings = {"decoder": kind, "decoder_dim": decoder_dim, "decoder_depth": depth}
    if local:
        settings["decoder_heads"] = _shape(state, "decoder.blocks.0.attn.tau", 1)[0]
    if kind == "hybrid":
        settings["hybrid_global_layers"] = depth - len(local)
    return settings

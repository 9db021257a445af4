"""Whether tensors from a file are weights, and those of a model: found before anything large is made of them."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from audiomae.checkpoints.files import CheckpointError, check_tensors
from audiomae.checkpoints.names import shown
from audiomae.config import EncoderConfig

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST_ALIKE = 16  # places that may share a number, as those of a patch's channels do where ``expand`` made them


def check_kinds(state: Mapping[str, Tensor]) -> None:
    """Check that tensors are what weights are: strided, of floating-point numbers that are there.

    Raises:
        CheckpointError: Other tensors; names the first one.
    """
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{shown(name)} is {type(tensor).__name__}, expected a tensor")
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.dtype not in FLOATS:
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            kind = f"a {layout} tensor of {str(tensor.dtype).removeprefix('torch.')}"
            raise CheckpointError(f"{shown(name)} is {kind}, expected a strided one of floating-point numbers")
        if _is_short(tensor):
            raise CheckpointError(f"{shown(name)} has fewer numbers than its shape {tuple(tensor.shape)} tells")


def _is_short(tensor: Tensor) -> bool:
    """Whether a tensor has far fewer numbers than places: so a small file could tell of terabytes."""
    if tensor.is_meta:
        return True
    own = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    there = min(own, tensor.untyped_storage().nbytes() // tensor.element_size())
    return tensor.numel() > _MOST_ALIKE * there


def check_model(make: Callable[[], nn.Module], config: EncoderConfig, state: Mapping[str, Tensor]) -> None:
    """Check that tensors are those of a model, which is made without memory for its weights.

    Args:
        make: Makes the model.
        config: Its configuration.
        state: Tensors that :func:`check_kinds` has seen.

    Raises:
        ValueError: Missing or unknown tensors, wrong shapes, or a configuration that makes no model.
    """
    _check_sizes(config, state)
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:  # PyTorch's own, of sizes that no tensor has
        raise CheckpointError(f"makes no model: {str(error).splitlines()[0]}") from error
    check_tensors(expected, state)


def _check_sizes(config: EncoderConfig, state: Mapping[str, Tensor]) -> None:
    """Check the sizes that a model takes long to be made of, or much memory, even where its weights take none."""
    blocks = config.depth + (getattr(config, "decoder_depth", None) or 0)
    if blocks > len(state):
        raise CheckpointError(f"a configuration of {blocks} blocks for {len(state)} tensors, expected some for each")
    width = max(config.embed_dim, getattr(config, "decoder_dim", 0))
    positions, numbers = config.grid.num_patches * width, sum(tensor.numel() for tensor in state.values())
    if positions > numbers:
        raise CheckpointError(
            f"a configuration of {config.grid.num_patches} patches and a width of {width}, "
            f"which would take more than all {numbers} numbers of its tensors"
        )

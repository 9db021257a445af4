"""Compilation and activation checkpoints, block by block."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from audiomae.decoder import LocalBlock
from audiomae.encoder import Block


def blocks_of(model: nn.Module) -> list[Block | LocalBlock]:
    """The transformer blocks of a model."""
    return [module for module in model.modules() if isinstance(module, Block | LocalBlock)]


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile the transformer blocks of a model, in place.

    Blocks of one kind and shape share what is compiled: ViT-B takes two or three compilations, where the whole model
    as one graph takes minutes. What lies between blocks, masks, gather and loss, are operators that need no compiler.

    Args:
        model: Its state dictionary stays as it is.
        options: Of torch.compile.
    """
    for block in blocks_of(model):
        block.compile(**options)


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep the input of each transformer block alone for its backward, which computes the rest anew; in place.

    Args:
        model: Its state dictionary stays as it is. Blocks that are compiled too must be compiled afterwards.
    """
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]

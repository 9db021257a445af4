"""torch.compile, block by block."""

from typing import Any

from torch import nn

from audiomae.decoder import LocalBlock
from audiomae.encoder import Block


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile the transformer blocks of a model, in place.

    Blocks of one kind and shape share what is compiled: ViT-B takes two or three compilations, where the whole model
    as one graph takes minutes. What lies between blocks, masks, gather and loss, are operators that need no compiler.

    Args:
        model: Its state dictionary stays as it is.
        options: Of torch.compile.
    """
    for module in model.modules():
        if isinstance(module, Block | LocalBlock):
            module.compile(**options)

"""What an operator is measured on: the model's sizes, a call, and the least that it must move and compute."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mae_kernels
from torch import Tensor

PATCH = 16


@dataclass(frozen=True)
class Sizes:
    """The model's sizes: by default ViT-B with the local decoder on 1024 x 128 spectrograms, 0.8 of them masked.

    Attributes:
        grid: Patches along time and frequency.
        kept: Patches that the encoder sees.
        dim: Width of the encoder's tokens.
        heads: Of the encoder.
        decoder_dim: Width of the decoder's tokens.
        decoder_heads: Of the decoder.
        window: Tokens of a window along time and frequency.
        shift: Of the windows.
    """

    grid: tuple[int, int] = (64, 8)
    kept: int = 102
    dim: int = 768
    heads: int = 12
    decoder_dim: int = 512
    decoder_heads: int = 16
    window: tuple[int, int] = (4, 4)
    shift: tuple[int, int] = (2, 0)

    @property
    def length(self) -> int:
        """Patches."""
        return self.grid[0] * self.grid[1]

    @property
    def removed(self) -> int:
        """Patches that the encoder does not see."""
        return self.length - self.kept

    @property
    def area(self) -> int:
        """Tokens of a window."""
        return self.window[0] * self.window[1]


VIT_B = Sizes()


@dataclass(frozen=True)
class Floor:
    """What an operator must move and compute at least, as its module's docstring derives it.

    Attributes:
        read_and_written: Bytes.
        flops: Floating-point operations of its matrix products.
    """

    read_and_written: int
    flops: int = 0


Outputs = Tensor | tuple[Tensor, ...]
Form = Callable[[dict[str, Tensor]], Outputs]
"""Computes an operator from its tensors."""


@dataclass(frozen=True)
class Workload:
    """A call of an operator.

    Attributes:
        operator: Its name.
        tensors: Arguments; those that the model trains through require gradients.
        options: Arguments that are no tensors.
        shape: The sizes to tell it by.
        forward: Floor of a call.
        backward: Floor of its backward, None where it has none.
        summed: Rows that the gradient of a parameter sums over: rounding grows with their number.
        build: Makes a form of the operator, for float64 where ``exact``; None where mae_kernels has it.
    """

    operator: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    shape: dict[str, Any]
    forward: Floor
    backward: Floor | None = None
    summed: int = 0
    build: Callable[[str, bool], Form] | None = None

    def form(self, impl: str, *, exact: bool = False) -> Form:
        """The operator in one of its forms; ``exact`` where its tensors will be float64."""
        if self.build is not None:
            return self.build(impl, exact)
        function = getattr(mae_kernels, self.operator)
        return lambda tensors: function(**tensors, **self.options, impl=impl)

    def __call__(self, impl: str) -> Outputs:
        """Run the operator."""
        return self.form(impl)(self.tensors)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that require gradients."""
        return [tensor for tensor in self.tensors.values() if tensor.requires_grad]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

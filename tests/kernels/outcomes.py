"""What a module computes, for comparisons of modules: outputs and the gradients of inputs and parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcome(
    module: nn.Module, inputs: Mapping[str, Tensor], run: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """What a module gives, or ``run`` with its parameters, and all gradients for random upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    leaves = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    outputs = (module if run is None else run)(**leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    outputs = [output for output in outputs if output.requires_grad]
    if outputs:
        upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        named = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad} | dict(module.named_parameters())
        gradients = torch.autograd.grad(
            outputs, list(named.values()), upstream, allow_unused=True, materialize_grads=True
        )
        found |= {f"gradient of {name}": gradient for name, gradient in zip(named, gradients, strict=True)}
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def scatter_parameters(module: nn.Module) -> None:
    """Move all parameters away from where they start, so that none of 0 or 1 hides an error."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * draw(*parameter.shape, seed=index + 1).to(parameter))

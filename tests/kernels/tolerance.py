"""How close a result must come to the truth, and the comparisons that ask for it."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# The error that a result may have, as a norm over all its values and relative to the truth's: some roundings.
RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}

# What a kernel may be off by, besides twice what PyTorch is in the same dtype: a rounding of the largest value.
KERNEL_ERROR = {torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}

SIGMAS = 5
"""Standard deviations by which a count may miss its mean: one in 1.7 million draws misses by more."""


def assert_binomial(count: Tensor, trials: int, probability: float) -> None:
    """Hold counts of independent draws to their mean."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    sigmas = ((count - trials * probability) / deviation).abs().max().item()
    assert sigmas < SIGMAS, f"{sigmas:.1f} standard deviations from {trials * probability:.1f} of {trials}"


def assert_accurate(what: str, actual: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Hold ``actual`` to what computing it in ``dtype`` may cost."""
    assert actual.shape == truth.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    error = (actual.double() - truth.double()).norm().item()
    bound = RELATIVE_ERROR[dtype] * truth.double().norm().item()
    assert error <= bound, f"{what} is off by {error:.2e}, the bound is {bound:.2e}"


def with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Mapping[str, Tensor],
    seed: int = 0,
    rounding: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Outputs, and gradients of all floating ``tensors`` for upstream gradients drawn from ``seed``.

    The latter are rounded to ``rounding``, so that a function in float64 can be given what one in that dtype gets.
    """
    leaves = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    outputs = function(**leaves)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(rounding).to(o) for o in outputs]
    inputs = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if any(output.requires_grad for output in outputs):
        gradients = torch.autograd.grad(
            outputs, list(inputs.values()), upstream, allow_unused=True, materialize_grads=True
        )
    else:
        gradients = tuple(torch.zeros_like(leaf) for leaf in inputs.values())
    return {f"output {i}": output.detach() for i, output in enumerate(outputs)} | {
        f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)
    }


def assert_same_function(
    actual: Callable[..., Tensor | tuple[Tensor, ...]],
    truth: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Mapping[str, Tensor],
    *,
    rtol: float = 1e-10,
    atol: float = 1e-12,
) -> None:
    """Compare outputs and, for a random upstream gradient, all gradients, value by value."""
    results, expected = with_gradients(actual, tensors), with_gradients(truth, tensors)
    assert results.keys() == expected.keys()
    torch.testing.assert_close(results, expected, rtol=rtol, atol=atol)


def assert_kernel_accurate(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Hold a kernel to at most twice the error of PyTorch in the same dtype, and a rounding.

    Outputs and all gradients, for random upstream gradients; errors are the largest, against ``reference`` in float64.

    Args:
        kernel: What is tested.
        reference: The same in plain PyTorch.
        tensors: Arguments; floating ones are rounded to ``dtype`` first.
        dtype: A dtype of ``KERNEL_ERROR``.
    """
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in rounded.items()}
    results, published = with_gradients(kernel, rounded), with_gradients(reference, rounded)
    for what, truth in with_gradients(reference, exact, rounding=dtype).items():
        actual, plain = results[what], published[what]
        assert (actual.shape, actual.dtype) == (plain.shape, plain.dtype), what
        if truth.numel() == 0:
            continue
        truth = truth.double()
        error, allowed = ((x.double() - truth).abs().max().item() for x in (actual, plain))
        bound = 2 * allowed + KERNEL_ERROR[dtype] * truth.abs().max().item()
        assert error <= bound, f"{what} in {dtype} is off by {error:.2e}, PyTorch by {allowed:.2e}: over {bound:.2e}"

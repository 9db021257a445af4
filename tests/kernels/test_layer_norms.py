"""Residual addition with a LayerNorm after it (``add_layer_norm``) or before it (``layer_norm_add``)."""

from functools import partial

import mae_kernels
import pytest
import torch
from torch import Tensor

from .calls import CALLS, KERNEL_DEVICE, torch_forms
from .tolerance import assert_accurate, assert_kernel_accurate, assert_same_function, with_gradients

NAMES = ["add_layer_norm", "layer_norm_add"]
OPERATORS = [(name, form) for name in NAMES for form in torch_forms(name)]
SHAPES = [(2, 5, 8), (3, 7), (1, 1, 13), (2, 3, 5, 4), (4, 2, 1), (0, 5, 8), (2, 0, 8), (2, 3, 257)]


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(dim=-1, keepdim=True) / x.shape[-1]
    variance = centred.square().sum(dim=-1, keepdim=True) / x.shape[-1]
    return centred / (variance + eps).sqrt() * weight + bias


def truth(
    operator: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None = None,
    *,
    eps: float,
) -> Tensor | tuple[Tensor, Tensor]:
    scale = 1 if branch_scale is None else branch_scale.reshape(-1, *[1] * (x.dim() - 1))
    if operator == "layer_norm_add":
        return residual + scale * normalise(x, weight, bias, eps)
    total = residual + scale * x
    return total, normalise(total, weight, bias, eps)


def draw(shape: tuple[int, ...], scaled: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:]}
    if scaled:
        shapes["branch_scale"] = shape[:1]
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("operator", "impl"), OPERATORS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(operator, shape, eps, scaled, impl):
    assert_same_function(
        lambda **tensors: getattr(mae_kernels, operator)(**tensors, eps=eps, impl=impl),
        lambda **tensors: truth(operator, **tensors, eps=eps),
        draw(shape, scaled),
    )


# One row short of a tile and one more, rows wider than a tile, nothing at all.
KERNEL_SHAPES = [*SHAPES, (2, 127, 16), (3, 43, 17), (257, 16), (1, 3, 768), (5, 512), (2, 5000), (3, 8192)]


def kernel_arguments(shape: tuple[int, ...], scaled: bool) -> dict[str, Tensor]:
    return {name: tensor.to(KERNEL_DEVICE) for name, tensor in draw(shape, scaled).items()}


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernels_equal_the_reference(operator, shape, dtype, scaled):
    run = partial(getattr(mae_kernels, operator), eps=1e-6)
    tensors = kernel_arguments(shape, scaled)
    assert_kernel_accurate(partial(run, impl="triton"), partial(run, impl="reference"), tensors, dtype)


@pytest.mark.parametrize("operator", NAMES)
def test_kernels_lose_nothing_to_a_large_mean(operator):
    tensors = kernel_arguments((4, 7, 96), scaled=False)
    tensors["x"] += 1000
    run = partial(getattr(mae_kernels, operator), eps=1e-6)
    assert_kernel_accurate(partial(run, impl="triton"), partial(run, impl="reference"), tensors, torch.float32)


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("wide", ["x", "residual"])
def test_a_float32_stream_takes_branches_of_another_dtype(operator, impl, wide):
    exact = kernel_arguments((2, 5, 24), scaled=True)
    tensors = {
        name: t.to(torch.float32 if name in (wide, "weight", "bias") else torch.bfloat16) for name, t in exact.items()
    }
    run = partial(getattr(mae_kernels, operator), eps=1e-6)
    results, published = (with_gradients(partial(run, impl=form), tensors) for form in (impl, "reference"))
    rounded = {name: tensor.double() for name, tensor in tensors.items()}
    for what, value in with_gradients(partial(run, impl="reference"), rounded).items():
        assert results[what].dtype == published[what].dtype, what
        assert_accurate(what, results[what], value, torch.bfloat16)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_of_add_layer_norm_may_go_unused(used):
    def run(impl, **tensors):
        return mae_kernels.add_layer_norm(**tensors, eps=1e-6, impl=impl)[used]

    tensors = {name: tensor.float() for name, tensor in kernel_arguments((2, 5, 24), scaled=True).items()}
    results, expected = (with_gradients(partial(run, impl), tensors) for impl in ("triton", "reference"))
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("operator", "impl"), OPERATORS)
def test_a_dropped_branch_leaves_the_residual(operator, impl):
    call = CALLS[operator]
    outputs = call(branch_scale=torch.tensor([0.0, 1.0], dtype=torch.float64), impl=impl)
    total = outputs if isinstance(outputs, Tensor) else outputs[0]
    torch.testing.assert_close(total[0], call.tensors["residual"][0], rtol=0, atol=0)
    assert not torch.equal(total[1], call.tensors["residual"][1])


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": torch.zeros(2, 4, 8)}, r"residual has shape \(2, 4, 8\), expected \(2, 5, 8\)"),
        ({"residual": torch.zeros(8)}, r"residual has shape \(8,\), expected \(2, 5, 8\)"),
        ({"weight": torch.zeros(7)}, r"weight has shape \(7,\), expected \(8,\)"),
        ({"bias": torch.zeros(1, 8)}, r"bias has shape \(1, 8\), expected \(8,\)"),
        ({"branch_scale": torch.zeros(5)}, r"branch_scale has shape \(5,\), expected \(2,\)"),
        ({"branch_scale": torch.zeros(2, 1, 1)}, r"branch_scale has shape \(2, 1, 1\), expected \(2,\)"),
    ],
)
def test_wrong_arguments_are_refused(operator, changes, message):
    with pytest.raises(ValueError, match=rf"^{operator}: {message} for x \(2, 5, 8\)$"):
        CALLS[operator](**changes)

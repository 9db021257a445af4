"""Residual addition with a LayerNorm after it (``add_layer_norm``) or before it (``layer_norm_add``)."""

import mae_kernels
import pytest
import torch
from torch import Tensor

from .calls import CALLS, torch_forms
from .tolerance import assert_same_function

OPERATORS = [(name, form) for name in ("add_layer_norm", "layer_norm_add") for form in torch_forms(name)]
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


@pytest.mark.parametrize(("operator", "impl"), OPERATORS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(operator, shape, eps, scaled, impl):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:]}
    if scaled:
        shapes["branch_scale"] = shape[:1]
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    assert_same_function(
        lambda **tensors: getattr(mae_kernels, operator)(**tensors, eps=eps, impl=impl),
        lambda **tensors: truth(operator, **tensors, eps=eps),
        tensors,
    )


@pytest.mark.parametrize(("operator", "impl"), OPERATORS)
def test_a_dropped_branch_leaves_the_residual(operator, impl):
    call = CALLS[operator]
    outputs = call(branch_scale=torch.tensor([0.0, 1.0], dtype=torch.float64), impl=impl)
    total = outputs if isinstance(outputs, Tensor) else outputs[0]
    torch.testing.assert_close(total[0], call.tensors["residual"][0], rtol=0, atol=0)
    assert not torch.equal(total[1], call.tensors["residual"][1])


@pytest.mark.parametrize("operator", ["add_layer_norm", "layer_norm_add"])
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

import math

import pytest
import torch
from mae_kernels import mlp
from torch import Tensor

from .calls import CALLS, torch_forms
from .tolerance import assert_same_function

# x, hidden width, output width
SHAPES = [
    ((2, 5, 8), 32, 8),
    ((3, 7), 5, 11),
    ((13,), 3, 2),
    ((2, 1, 3, 4), 16, 4),
    ((1, 1), 1, 1),
    ((0, 5, 8), 32, 8),
]


def gelu_mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    hidden = x @ fc1_weight.T + fc1_bias
    return (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))) @ fc2_weight.T + fc2_bias


@pytest.mark.parametrize("impl", torch_forms("mlp"))
@pytest.mark.parametrize(("shape", "hidden", "out"), SHAPES)
def test_equals_the_formula(shape, hidden, out, impl):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": shape,
        "fc1_weight": (hidden, shape[-1]),
        "fc1_bias": (hidden,),
        "fc2_weight": (out, hidden),
        "fc2_bias": (out,),
    }
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    assert_same_function(lambda **tensors: mlp(**tensors, impl=impl), gelu_mlp, tensors)


@pytest.mark.parametrize("impl", torch_forms("mlp"))
def test_a_strided_input_is_read_as_it_is(impl):
    call = CALLS["mlp"]
    x = call.tensors["x"].transpose(0, 1)
    torch.testing.assert_close(call(x=x, impl=impl), call(x=x.contiguous(), impl=impl), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5, 7)}, r"x has shape \(2, 5, 7\), expected \(\.\.\., D\) with D = 8"),
        ({"x": torch.zeros(())}, r"x has shape \(\), expected \(\.\.\., D\) with D = 8"),
        ({"fc1_weight": torch.zeros(16)}, r"fc1_weight has shape \(16,\), expected \(H, D\)"),
        ({"fc1_bias": torch.zeros(8)}, r"fc1_bias has shape \(8,\), expected \(H\) with H = 16"),
        ({"fc2_weight": torch.zeros(6, 8)}, r"fc2_weight has shape \(6, 8\), expected \(E, H\) with H = 16"),
        ({"fc2_bias": torch.zeros(8)}, r"fc2_bias has shape \(8,\), expected \(E\) with E = 6"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^mlp: {message}$"):
        CALLS["mlp"](**changes)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"^mlp: fc1_bias is a list, expected a tensor \(H\)$"):
        CALLS["mlp"](fc1_bias=[0.0] * 16)


def test_a_bias_is_required():
    with pytest.raises(TypeError, match=r"^mlp: fc1_bias is a NoneType, expected a tensor \(H\)$"):
        CALLS["mlp"](fc1_bias=None)

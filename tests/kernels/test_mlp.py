import math
from functools import partial

import pytest
import torch
from mae_kernels import mlp
from torch import Tensor

from .calls import CALLS, KERNEL_DEVICE, torch_forms
from .tolerance import assert_kernel_accurate, assert_same_function, with_gradients

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


def draw(shape: tuple[int, ...], hidden: int, out: int) -> dict[str, Tensor]:
    """Arguments in float64, with activations of about one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": shape,
        "fc1_weight": (hidden, shape[-1]),
        "fc1_bias": (hidden,),
        "fc2_weight": (out, hidden),
        "fc2_bias": (out,),
    }
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return tensors | {name: tensors[name] / tensors[name].shape[1] ** 0.5 for name in ("fc1_weight", "fc2_weight")}


@pytest.mark.parametrize("impl", torch_forms("mlp"))
@pytest.mark.parametrize(("shape", "hidden", "out"), SHAPES)
def test_equals_the_formula(shape, hidden, out, impl):
    assert_same_function(partial(mlp, impl=impl), gelu_mlp, draw(shape, hidden, out))


@pytest.mark.parametrize(("shape", "hidden", "out"), SHAPES)
def test_chunks_of_rows_make_no_difference(shape, hidden, out, monkeypatch):
    monkeypatch.setattr("mae_kernels.ops.mlp._CHUNK_BYTES", 3 * 8 * hidden)
    tensors = draw(shape, hidden, out)
    assert_same_function(partial(mlp, impl="torch"), gelu_mlp, tensors)
    with torch.no_grad():
        torch.testing.assert_close(mlp(**tensors, impl="torch"), gelu_mlp(**tensors), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows_a_chunk", [2, 100])
def test_gradients_are_those_of_differences(rows_a_chunk, monkeypatch):
    monkeypatch.setattr("mae_kernels.ops.mlp._CHUNK_BYTES", rows_a_chunk * 8 * 4)
    arguments = [tensor.requires_grad_() for tensor in draw((5, 3), 4, 2).values()]
    assert torch.autograd.gradcheck(partial(mlp, impl="torch"), arguments)


# x, hidden width, output width: a block of columns and its neighbours; more rows than a program's and than a block's
KERNEL_SHAPES = [
    *SHAPES,
    ((13,), 257, 3),
    ((1, 5), 256, 13),
    ((0, 5), 300, 3),
    ((7, 5), 515, 3),
    ((2, 3, 53, 5), 5, 3),
    ((2, 0, 5), 5, 3),
    ((4099, 3), 2, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "hidden", "out"), KERNEL_SHAPES)
def test_kernels_equal_the_reference(shape, hidden, out, dtype):
    tensors = {name: tensor.to(KERNEL_DEVICE) for name, tensor in draw(shape, hidden, out).items()}
    assert_kernel_accurate(partial(mlp, impl="triton"), partial(mlp, impl="reference"), tensors, dtype)


def test_the_gelu_of_kernels_is_exact_to_float32():
    """To two roundings of a number below 2: of itself and its derivative up to 1, in proportion beyond."""
    x = torch.linspace(-20, 20, 40_001, dtype=torch.float32)[:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)

    def derived(dtype: torch.dtype, device: str, impl: str) -> tuple[Tensor, Tensor]:
        leaf, *others = (tensor.to(device, dtype, copy=True) for tensor in (x, one, zero, one, zero))
        out = mlp(leaf.requires_grad_(), *others, impl=impl)
        out.sum().backward()
        return out.detach().cpu().double(), leaf.grad.cpu().double()

    results, truth = derived(torch.float32, KERNEL_DEVICE, "triton"), derived(torch.float64, "cpu", "reference")
    for result, exact in zip(results, truth, strict=True):
        assert ((result - exact).abs() / x.abs().clamp(min=1)).max() < 2 * 2**-23


FUSED = ["torch", "triton"]


def on_device(impl: str, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.to(KERNEL_DEVICE if impl == "triton" else "cpu", dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("trained", [*CALLS["mlp"].tensors, ("fc1_weight", "fc1_bias"), ("fc2_weight", "fc2_bias")])
@pytest.mark.parametrize("impl", FUSED)
def test_frozen_arguments_get_no_gradient(trained, impl):
    tensors = on_device(impl, draw((2, 7, 5), 300, 3))
    expected = with_gradients(partial(mlp, impl=impl), tensors)
    trained = (trained,) if isinstance(trained, str) else trained
    leaves = {name: tensor.clone().requires_grad_(name in trained) for name, tensor in tensors.items()}
    out = mlp(**leaves, impl=impl)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out))
    for name, leaf in leaves.items():
        if name in trained:
            torch.testing.assert_close(leaf.grad, expected[f"gradient of {name}"], rtol=0, atol=0)
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("impl", FUSED)
def test_without_gradients_the_output_is_the_same(impl):
    tensors = on_device(impl, draw((3, 7, 5), 300, 3))
    expected = mlp(**tensors | {"x": tensors["x"].clone().requires_grad_()}, impl=impl)
    assert expected.requires_grad
    torch.testing.assert_close(mlp(**tensors, impl=impl), expected.detach(), rtol=0, atol=0)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with torch.no_grad():
        torch.testing.assert_close(mlp(**leaves, impl=impl), expected.detach(), rtol=0, atol=0)


def saved_bytes(impl: str, tensors: dict[str, Tensor]) -> int:
    """Bytes that forward keeps for backward, besides the weights."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    weights = {leaf.data_ptr() for name, leaf in leaves.items() if name != "x"}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mlp(**leaves, impl=impl)
    return sum(storages.values())


@pytest.mark.parametrize("impl", FUSED)
def test_one_wide_tensor_is_kept(impl):
    rows, dim, hidden = 6, 5, 40
    tensors = on_device(impl, draw((2, 3, dim), hidden, 3))
    assert saved_bytes("reference", tensors) == 4 * rows * (dim + 2 * hidden)
    assert saved_bytes(impl, tensors) == 4 * rows * (dim + hidden)


def test_float32_biases_are_added_in_float32_under_autocast():
    tensors = on_device("triton", draw((2, 7, 5), 300, 3))
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        results = with_gradients(partial(mlp, impl="triton"), tensors)
        small = mlp(**tensors | {"fc1_bias": tensors["fc1_bias"].bfloat16().float()}, impl="triton")
    assert results["output 0"].dtype == torch.bfloat16
    assert not torch.equal(results["output 0"], small)
    assert all(results[f"gradient of {name}"].dtype == torch.float32 for name in tensors)


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


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("argument", ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"])
def test_another_dtype_is_refused_without_autocast(argument, impl):
    tensors = on_device(impl, CALLS["mlp"].tensors)
    tensors[argument] = tensors[argument].bfloat16()
    expected = rf"^mlp: {argument} has dtype torch.bfloat16, expected torch.float32, which x has$"
    with pytest.raises(TypeError, match=expected):
        mlp(**tensors, impl=impl)
    with torch.autocast(tensors["x"].device.type, torch.bfloat16):
        assert mlp(**tensors, impl=impl).dtype == torch.bfloat16

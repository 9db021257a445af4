"""What holds for the Triton form of every operator: registration, compilation, autocast, determinism, refusals."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from mae_kernels.ops import OPERATORS
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import CALLS, KERNEL_DEVICE, KERNEL_DTYPES
from .tolerance import assert_accurate, assert_kernel_accurate, with_gradients

FUSED = [operator for operator in OPERATORS if operator != "flash_attention"]
"""Operators with kernels of our own."""
DIFFERENTIABLE = [operator for operator in FUSED if operator != "random_mask"]
CALLS = {operator: CALLS[operator].on(KERNEL_DEVICE) for operator in FUSED}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("operator", FUSED)
def test_equals_the_reference(operator, dtype):
    call = CALLS[operator]
    assert_kernel_accurate(partial(call, impl="triton"), partial(call, impl="reference"), call.tensors, dtype)


class RecordOperators(TorchDispatchMode):
    """Keeps what the operators of mae_kernels are called with."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mae_kernels":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", FUSED)
def test_registered_operators_pass_opcheck(operator):
    call = CALLS[operator].to(torch.float32)
    with RecordOperators() as recorded:
        with_gradients(partial(call, impl="triton"), call.tensors)
    assert recorded.calls
    for registered, arguments in recorded.calls.items():
        torch.library.opcheck(registered, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments))


@pytest.mark.parametrize("operator", FUSED)
def test_compiles_without_a_graph_break(operator):
    call = CALLS[operator].to(torch.float32)
    run = partial(call, impl="triton")
    compiled = torch.compile(lambda **tensors: run(**tensors), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        with_gradients(compiled, call.tensors), with_gradients(run, call.tensors), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", FUSED)
def test_gives_the_same_bits_twice(operator, dtype):
    call = CALLS[operator].to(dtype)
    first, second = (with_gradients(partial(call, impl="triton"), call.tensors) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_bfloat16_autocast(operator):
    exact, call = CALLS[operator], CALLS[operator].to(torch.float32)
    truth = with_gradients(exact, exact.tensors)
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        published = with_gradients(partial(call, impl="reference"), call.tensors)
        results = with_gradients(partial(call, impl="triton"), call.tensors)
    for what, value in truth.items():
        # A norm's output goes into a product, which autocast would round: it comes rounded.
        rounded = (operator, what) == ("add_layer_norm", "output 1")
        assert results[what].dtype == (torch.bfloat16 if rounded else published[what].dtype), what
        assert_accurate(what, results[what], value, torch.bfloat16)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_strided_inputs_are_read_as_they_are(operator):
    call = CALLS[operator].to(torch.float32)
    strided = {
        name: tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor
        for name, tensor in call.tensors.items()
    }
    assert not all(tensor.is_contiguous() for tensor in strided.values())
    run = partial(call, impl="triton")
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in strided.items()}
    outputs = run(**leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    expected = with_gradients(run, call.tensors)
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, expected[f"output {i}"], rtol=0, atol=0)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_gradients_that_are_expanded_are_read_as_they_are(operator):
    call = CALLS[operator].to(torch.float32)
    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()}
    inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def gradients(impl):
        outputs = call(**leaves, impl=impl)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return torch.autograd.grad(sum(output.sum() for output in outputs), inputs, materialize_grads=True)

    torch.testing.assert_close(gradients("triton"), gradients("reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_float64_is_refused(operator):
    with pytest.raises(TypeError, match=rf"^{operator}: impl is 'triton' for torch.float64, expected float32, bfloat"):
        CALLS[operator](impl="triton")


@pytest.mark.parametrize("operator", FUSED)
def test_a_missing_triton_is_named(operator, monkeypatch):
    monkeypatch.setattr("mae_kernels._forms._HAS_TRITON", False)
    call = CALLS[operator].to(torch.float32)
    with pytest.raises(ImportError, match=rf"^{operator}: impl is 'triton', which needs the package triton$"):
        call(impl="triton")


@pytest.mark.parametrize("operator", FUSED)
def test_a_device_without_triton_is_named(operator, monkeypatch):
    monkeypatch.setattr("mae_kernels.kernels._registration.INTERPRETED", False)
    call = CALLS[operator].to(torch.float32).on("cpu")
    expected = rf"^{operator}: impl is 'triton' for tensors on cpu, expected a CUDA or ROCm device$"
    with pytest.raises(ValueError, match=expected):
        call(impl="triton")


@pytest.mark.parametrize("operator", FUSED)
def test_meta_tensors_pass_through(operator):
    call = CALLS[operator].to(torch.float32)
    outputs, shadows = call(impl="triton"), call.on("meta")(impl="triton")
    outputs, shadows = ((o,) if isinstance(o, torch.Tensor) else o for o in (outputs, shadows))
    assert [(o.shape, o.dtype) for o in outputs] == [(s.shape, s.dtype) for s in shadows]


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(operator):
    call = CALLS[operator].to(torch.float32)
    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()}
    outputs = call(**leaves, impl="triton")
    output = outputs if isinstance(outputs, torch.Tensor) else outputs[-1]
    inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
    gradients = torch.autograd.grad(output.square().sum(), inputs, create_graph=True, allow_unused=True)
    loss = sum(g.square().sum() for g in gradients if g is not None and g.requires_grad)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        loss.backward()

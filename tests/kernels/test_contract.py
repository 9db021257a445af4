"""What holds for every operator: how a form is chosen, what is refused, compilation, autocast, low precision."""

from collections.abc import Callable
from functools import partial

import mae_kernels
import pytest
import torch
from mae_kernels._forms import resolve_form
from mae_kernels.ops import OPERATORS, resolve_forms
from torch import Tensor

from .calls import CALLS, torch_forms
from .tolerance import assert_accurate, with_gradients

DIFFERENTIABLE = [operator for operator in CALLS if operator != "random_mask"]
FORMS = [(operator, form) for operator in CALLS for form in torch_forms(operator)]


def tensor_arguments(keep: Callable[[Tensor], bool]) -> list[tuple[str, str]]:
    return [(operator, name) for operator, call in CALLS.items() for name, t in call.tensors.items() if keep(t)]


def test_every_public_operator_is_called_here():
    assert set(CALLS) == set(OPERATORS) == set(mae_kernels.__all__) - {"Impl", "check_impl", "fuse", "unfuse"}


@pytest.mark.parametrize("operator", CALLS)
def test_an_unknown_impl_is_refused(operator):
    expected = r"^impl is 'cuda', expected one of 'reference', 'torch', 'triton', 'auto'$"
    with pytest.raises(ValueError, match=expected):
        CALLS[operator](impl="cuda")


@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_form_that_an_operator_lacks_is_refused(operator, impl, monkeypatch):
    module = OPERATORS[operator]
    monkeypatch.setattr(module, "FORMS", {"reference": module.FORMS["reference"]})
    with pytest.raises(
        NotImplementedError, match=f"^{operator} has no '{impl}' form in this version, only 'reference'"
    ):
        CALLS[operator](impl=impl)


@pytest.mark.parametrize(
    ("forms", "device_type", "dtype", "expected"),
    [
        (("reference",), "cuda", torch.bfloat16, ("reference", "no Triton kernels")),
        (("reference", "torch"), "cuda", torch.bfloat16, ("torch", "no Triton kernels")),
        (("reference", "torch", "triton"), "cuda", torch.bfloat16, ("triton", "cuda, torch.bfloat16")),
        (("reference", "torch", "triton"), "cuda", torch.float16, ("triton", "cuda, torch.float16")),
        (("reference", "torch", "triton"), "cuda", torch.float32, ("triton", "cuda, torch.float32")),
        (("reference", "torch", "triton"), "cuda", torch.float64, ("torch", "no Triton kernels for torch.float64")),
        (("reference", "torch", "triton"), "cpu", torch.float32, ("torch", "Triton needs a GPU, this is cpu")),
        (("reference", "torch", "triton"), "mps", torch.float32, ("torch", "Triton needs a GPU, this is mps")),
        (("reference", "triton"), "cpu", torch.float32, ("reference", "Triton needs a GPU, this is cpu")),
    ],
)
def test_auto_takes_triton_on_gpus_and_the_torch_form_elsewhere(forms, device_type, dtype, expected):
    table = dict.fromkeys(forms, print)
    assert resolve_form("operator", table, "auto", device_type=device_type, dtype=dtype) == expected
    for form in forms:
        assert resolve_form("operator", table, form, device_type=device_type, dtype=dtype) == (form, "asked for")


def test_auto_does_without_a_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("mae_kernels._forms._HAS_TRITON", False)
    table = dict.fromkeys(("reference", "torch", "triton"), print)
    resolved = resolve_form("operator", table, "auto", device_type="cuda", dtype=torch.bfloat16)
    assert resolved == ("torch", "triton is not installed")


def test_the_forms_of_all_operators_are_listed():
    assert resolve_forms("reference", "cuda", torch.bfloat16) == dict.fromkeys(OPERATORS, ("reference", "asked for"))
    assert resolve_forms("auto", "cpu", torch.float32).keys() == OPERATORS.keys()
    with pytest.raises(ValueError, match=r"^impl is 'fast', expected one of"):
        resolve_forms("fast", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("operator", "argument"), [pair for pair in tensor_arguments(lambda t: True) if pair[0] in DIFFERENTIABLE]
)
def test_tensors_on_two_devices_are_refused(operator, argument):
    tensors = CALLS[operator].tensors
    first = next(iter(tensors))
    if argument == first:
        expected = rf"^{operator}: \w+ is on cpu, expected meta, where {first} is$"
    else:
        expected = rf"^{operator}: {argument} is on meta, expected cpu, where {first} is$"
    with pytest.raises(ValueError, match=expected):
        CALLS[operator](**{argument: tensors[argument].to("meta")})


@pytest.mark.parametrize(("operator", "argument"), tensor_arguments(lambda t: t.is_floating_point()))
def test_a_tensor_that_is_not_floating_point_is_refused(operator, argument):
    expected = rf"^{operator}: {argument} has dtype torch.int32, expected a floating point dtype$"
    with pytest.raises(TypeError, match=expected):
        CALLS[operator](**{argument: CALLS[operator].tensors[argument].int()})


@pytest.mark.parametrize(("operator", "argument"), tensor_arguments(lambda t: not t.is_floating_point()))
def test_ids_and_seeds_that_are_not_int64_are_refused(operator, argument):
    expected = rf"^{operator}: {argument} has dtype torch.int32, expected torch.int64$"
    with pytest.raises(TypeError, match=expected):
        CALLS[operator](**{argument: CALLS[operator].tensors[argument].int()})


@pytest.mark.parametrize("wrong", [-1, 15])
@pytest.mark.parametrize(
    ("operator", "argument"),
    [pair for pair in tensor_arguments(lambda t: not t.is_floating_point()) if "ids" in pair[1]],
)
def test_an_id_out_of_range_is_refused_with_check(operator, argument, wrong):
    call = CALLS[operator]
    call(check=True)
    ids = call.tensors[argument].clone()
    ids[1, 0] = wrong
    expected = rf"^{operator}: {argument} holds values from {ids.min()} to {ids.max()}, expected 0 to 14$"
    with pytest.raises(ValueError, match=expected):
        call(**{argument: ids}, check=True)


@pytest.mark.parametrize(("operator", "form"), FORMS)
def test_arguments_are_left_as_they_are(operator, form):
    call = CALLS[operator]
    before = {name: tensor.clone() for name, tensor in call.tensors.items()}
    seen = {}

    def run(**tensors):
        seen.update(tensors)
        return call(impl=form, **tensors)

    with_gradients(run, call.tensors)
    torch.testing.assert_close({name: tensor.detach() for name, tensor in seen.items()}, before, rtol=0, atol=0)


@pytest.mark.parametrize("operator", CALLS)
def test_compiles_without_a_graph_break(operator):
    torch.compiler.reset()
    call = CALLS[operator].to(torch.float32)

    def run(**tensors):
        return call(**tensors)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results, expected = with_gradients(compiled, call.tensors), with_gradients(run, call.tensors)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("operator", "form"), [pair for pair in FORMS if pair[0] in DIFFERENTIABLE])
def test_bfloat16_autocast(operator, form):
    exact, call = CALLS[operator], CALLS[operator].to(torch.float32)
    truth = with_gradients(exact, exact.tensors)
    with torch.autocast("cpu", torch.bfloat16):
        published = with_gradients(partial(call, impl="reference"), call.tensors)
        results = with_gradients(partial(call, impl=form), call.tensors)
    for what, value in truth.items():
        assert results[what].dtype == published[what].dtype, what
        assert_accurate(what, results[what], value, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("operator", "form"), [pair for pair in FORMS if pair[0] in DIFFERENTIABLE])
def test_low_precision_inputs(operator, form, dtype):
    call = CALLS[operator].to(dtype)
    exact = call.to(torch.float64)
    truth = with_gradients(exact, exact.tensors)
    results = with_gradients(partial(call, impl=form), call.tensors)
    for what, value in truth.items():
        is_loss = operator.endswith("mse") and what == "output 0"
        assert results[what].dtype == (torch.float32 if is_loss else dtype), what
        assert_accurate(what, results[what], value, dtype)

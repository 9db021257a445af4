"""The adapters to flash-attn, against stand-ins with its signatures, and the rule that chooses among all backends."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from mae_kernels import attention_backends, attention_rule, flash_attention
from mae_kernels.attention_backends import BACKENDS, device_family, device_refusals
from mae_kernels.attention_rule import choose_backend, readable, refusals
from mae_kernels.ops.flash_attention import describe
from torch._subclasses.fake_tensor import FakeTensorMode

from .flash_attn_stubs import Stubs, attend
from .tolerance import assert_kernel_accurate, assert_same_function, with_gradients

LIBRARIES = ["fa2", "fa3", "fa4"]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    device_refusals.cache_clear()
    yield
    device_refusals.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def stubs(monkeypatch) -> Stubs:
    return Stubs(monkeypatch)


@pytest.fixture
def gpu(monkeypatch):
    """Lets the rule believe in a GPU of the family given, with a PyTorch that was built for it."""

    def pretend(family: str) -> torch.device:
        monkeypatch.setattr(attention_backends, "device_family", lambda device: family)
        for name in ("sdpa-flash", "sdpa-cudnn"):
            monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], built=lambda: True))
        return GPU

    return pretend


@pytest.fixture
def only(monkeypatch):
    """Lets the rule believe that one backend alone can run, also on CPU tensors."""

    def pretend(backend: str) -> None:
        refused = tuple((name, None if name in (backend, "sdpa") else "away") for name in BACKENDS)
        monkeypatch.setattr(attention_rule, "device_refusals", lambda *key: ("sm90", refused))

    return pretend


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name in "qkv"}


@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize(
    ("backend", "version"), [("fa2", "fa2"), ("fa3", "fa3"), ("fa3", "fa3_of_june_2025"), ("fa4", "fa4")]
)
def test_a_library_equals_the_formula(backend, version, scale, stubs):
    stubs.install(version)
    # The log-sum-exp that flash-attn 4 keeps for its backward is float32.
    tolerance = 1e-5 if backend == "fa4" else 1e-10
    assert_same_function(
        lambda q, k, v: BACKENDS[backend].run(q, k, v, scale),
        lambda q, k, v: attend(q, k, v, scale)[0],
        draw(2, 13, 3, 8),
        rtol=tolerance,
        atol=tolerance,
    )
    assert stubs.calls
    for call in stubs.calls:
        assert call["causal"] is False
        assert call.get("qv") is None
        assert call.get("dropout_p", 0.0) == 0.0


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_library_is_as_deterministic_as_pytorch_is_asked_to_be(backend, wanted, stubs):
    stubs.install(backend)
    torch.use_deterministic_algorithms(wanted)
    with_gradients(lambda q, k, v: BACKENDS[backend].run(q, k, v, None), draw(1, 3, 1, 8))
    assert [call["deterministic"] for call in stubs.calls if "deterministic" in call] == [wanted]


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_library_reads_the_views_of_a_packed_qkv(backend, stubs, only):
    stubs.install(backend)
    only(backend)
    qkv = torch.randn(2, 7, 3 * 2 * 8)
    views = dict(zip("qkv", qkv.unflatten(-1, (3, 2, 8)).unbind(2), strict=True))
    out = flash_attention(**views)
    assert out.shape == (2, 7, 2, 8)
    (call,) = stubs.calls
    for name, view in views.items():
        assert (call[name].data_ptr(), call[name].stride()) == (view.data_ptr(), view.stride())
    torch.testing.assert_close(out, flash_attention(**views, impl="reference"))


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_library_gets_the_autocast_dtype(backend, stubs, only):
    stubs.install(backend)
    only(backend)
    tensors = draw(2, 5, 2, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = with_gradients(flash_attention, tensors)
        published = with_gradients(partial(flash_attention, impl="reference"), tensors)
    assert {name: result.dtype for name, result in results.items()} == {n: p.dtype for n, p in published.items()}
    for tensor in [stubs.calls[0][name] for name in "qkv"] + [results["output 0"]]:
        assert tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8)], ids=str)
@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_library_is_not_asked_for_nothing(backend, shape, stubs, only):
    stubs.install(backend)
    only(backend)
    results = with_gradients(partial(flash_attention, backend=backend), draw(*shape))
    assert {result.shape for result in results.values()} == {shape}
    assert not stubs.calls


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_library_compiles_without_a_graph_break(backend, stubs, only):
    stubs.install(backend)
    only(backend)
    compiled = torch.compile(lambda **tensors: flash_attention(**tensors), fullgraph=True, backend="aot_eager")
    for shape in ((2, 5, 2, 8), (3, 7, 2, 8)):  # the second with sizes that may change
        tensors = draw(*shape, dtype=torch.float32)
        torch.testing.assert_close(with_gradients(compiled, tensors), with_gradients(flash_attention, tensors))


def test_operators_of_flash_attn_4_pass_opcheck(stubs):
    stubs.install("fa4")
    packed = torch.randn(2, 7, 3, 2, 8)
    q, k, v = packed.unbind(2)
    operators = torch.ops.mae_kernels
    torch.library.opcheck(operators.flash_attention_4.default, (q, k, v, 0.3))
    out, lse = operators.flash_attention_4(q, k, v, None)
    arguments = (torch.randn_like(out), q, k, v, out, lse, None, True)
    torch.library.opcheck(operators.flash_attention_4_backward.default, arguments)


def test_flash_attn_4_traces_with_tensors_of_a_gpu_that_is_not_there():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 7, 3, 8, dtype=torch.bfloat16, device="cuda") for _ in "qkv")
        out, lse = torch.ops.mae_kernels.flash_attention_4(q, k, v, None)
        gradients = torch.ops.mae_kernels.flash_attention_4_backward(out, q, k, v, out, lse, None, False)
    assert (lse.shape, lse.dtype, lse.device) == ((2, 3, 7), torch.float32, q.device)
    for tensor in (out, *gradients):
        assert (tensor.shape, tensor.dtype, tensor.device) == (q.shape, q.dtype, q.device)


@pytest.mark.parametrize(
    ("family", "installed", "expected"),
    [
        ("sm90", ("fa2", "fa3", "fa4"), "fa3"),
        ("sm90", ("fa2", "fa4"), "fa4"),
        ("sm90", ("fa2",), "fa2"),
        ("sm90", (), "sdpa-flash"),
        ("sm100", ("fa2", "fa3", "fa4"), "fa4"),
        ("sm100", ("fa2", "fa3"), "fa2"),
        ("sm80", ("fa2", "fa3", "fa4"), "fa2"),
        ("sm80", ("fa3", "fa4"), "sdpa-flash"),
        ("sm120", ("fa3", "fa4"), "sdpa-flash"),
        ("sm70", ("fa2", "fa3", "fa4"), "sdpa"),
        ("sm130", ("fa2", "fa3", "fa4"), "sdpa"),
        ("rocm", ("fa2", "fa3", "fa4"), "fa2"),
        ("rocm", (), "sdpa"),
        ("cpu", ("fa2", "fa3", "fa4"), "sdpa"),
        ("mps", ("fa2", "fa3", "fa4"), "sdpa"),
    ],
)
def test_the_order_that_nothing_has_measured(family, installed, expected, stubs, gpu):
    stubs.install(*installed)
    assert choose_backend(gpu(family), torch.bfloat16, 103, 64)[0] == expected


@pytest.mark.parametrize(
    ("dtype", "tokens", "head_dim", "expected"),
    [
        (torch.float16, 103, 64, "fa3"),
        (torch.float32, 103, 64, "sdpa-efficient"),
        (torch.float64, 103, 64, "sdpa"),
        (torch.bfloat16, 103, 192, "fa3"),
        (torch.bfloat16, 103, 200, "fa2"),
        (torch.bfloat16, 103, 264, "sdpa"),
        (torch.bfloat16, 103, 36, "sdpa"),
        (torch.bfloat16, 1, 8, "fa3"),
    ],
)
def test_what_a_backend_cannot_take_goes_to_the_next(dtype, tokens, head_dim, expected, stubs, gpu):
    stubs.install(*LIBRARIES)
    assert choose_backend(gpu("sm90"), dtype, tokens, head_dim)[0] == expected


def test_a_measured_order_counts_from_its_number_of_tokens(stubs, gpu, monkeypatch):
    stubs.install("fa3")
    measured = ((0, ("sdpa-cudnn", "sdpa-efficient")), (129, ("fa2", "fa3")))
    monkeypatch.setitem(attention_rule.RULE, "sm90", measured)
    torch.use_deterministic_algorithms(False)
    device = gpu("sm90")
    chosen = {tokens: choose_backend(device, torch.bfloat16, tokens, 64) for tokens in (1, 2, 128, 129, 513)}
    assert {tokens: name for tokens, (name, _) in chosen.items()} == {
        1: "sdpa-efficient",
        2: "sdpa-cudnn",
        128: "sdpa-cudnn",
        129: "fa3",
        513: "fa3",
    }
    assert chosen[2][1] == "first in the order measured on sm90"
    assert chosen[1][1] == "first in the order measured on sm90; sdpa-cudnn: takes at least 2 tokens"
    assert chosen[513][1] == "first in the order measured on sm90; fa2: flash-attn is not installed"
    assert choose_backend(device, torch.float32, 513, 64)[0] == "sdpa"


def test_orders_name_backends_and_begin_with_no_tokens():
    orders = [attention_rule.UNMEASURED]
    for entries in attention_rule.RULE.values():
        least = [tokens for tokens, _ in entries]
        assert least == sorted({0, *least})
        orders += [order for _, order in entries]
    assert {name for order in orders for name in order} <= set(BACKENDS)


def test_the_choice_for_a_gpu_is_described(stubs, gpu):
    stubs.install("fa2")
    assert describe(gpu("sm90"), torch.bfloat16, 103, 64) == (
        "flash_attention: fa2 for 103 tokens: first in the order not yet measured on sm90; "
        "fa3: flash-attn 3 is not installed; fa4: flash-attn-4 is not installed"
    )


def test_reasons_are_given(stubs, gpu):
    device = gpu("sm80")
    _, reasons = refusals(device, torch.bfloat16, 103, 132)
    assert reasons == {
        "fa4": "runs on sm90, sm100, not on sm80",
        "fa3": "runs on sm90, not on sm80",
        "fa2": "flash-attn is not installed",
        "sdpa-flash": "takes heads whose width is a multiple of 8 up to 192",
        "sdpa-cudnn": "not deterministic, as torch.use_deterministic_algorithms asks",
        "sdpa-efficient": "takes heads whose width is a multiple of 8 up to 256",
        "math": None,
        "sdpa": None,
    }
    _, reasons = refusals(device, torch.float32, 103, 64)
    assert reasons["sdpa-flash"] == "computes in torch.float16, torch.bfloat16, not in torch.float32"
    assert reasons["sdpa-efficient"] is None


def test_a_pytorch_without_a_kernel_is_named(stubs, gpu, monkeypatch):
    device = gpu("sm90")
    monkeypatch.setitem(BACKENDS, "sdpa-flash", replace(BACKENDS["sdpa-flash"], built=lambda: False))
    assert refusals(device, torch.float16, 5, 8)[1]["sdpa-flash"] == "not in this build of PyTorch"


def test_the_attention_that_flash_attn_2_8_brings_is_not_taken_for_4(stubs, gpu):
    stubs.install("fa2", "cute_of_flash_attn_2_8")
    _, reasons = refusals(gpu("sm90"), torch.bfloat16, 103, 64)
    assert reasons["fa2"] is None
    expected = "flash_attn.cute.interface is of another version: no flash_attn_func(softmax_scale, return_lse)"
    assert reasons["fa4"] == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('undefined symbol: _ZN3c10\\nin libtorch.so')", "undefined symbol: _ZN3c10"),
        ("import flash_attn_interface_of_nobody", "No module named 'flash_attn_interface_of_nobody'"),
        ("from math import attention", "cannot import name 'attention' from 'math'"),
    ],
)
def test_a_library_that_does_not_import_is_passed_over(source, reason, stubs, gpu, tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    name, why = choose_backend(gpu("sm90"), torch.bfloat16, 103, 64)
    assert name == "sdpa-flash"
    assert f"fa3: flash_attn_interface does not import: {reason}" in why


@pytest.mark.parametrize(
    ("device", "available", "hip", "capability", "expected"),
    [
        ("cpu", True, None, (9, 0), "cpu"),
        ("meta", True, None, (9, 0), "meta"),
        ("cuda", False, None, None, "cuda"),
        ("cuda", True, None, (9, 0), "sm90"),
        ("cuda", True, None, (8, 6), "sm80"),
        ("cuda:1", True, None, (12, 1), "sm120"),
        ("cuda", True, "6.4", (9, 4), "rocm"),
    ],
)
def test_the_family_of_a_device(device, available, hip, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert device_family(torch.device(device)) == expected


def test_a_cpu_looks_for_no_library(monkeypatch):
    def refuse(library):
        raise AssertionError(f"looked for {library.package}")

    monkeypatch.setattr(attention_backends.Library, "missing", refuse)
    flash_attention(**draw(1, 3, 1, 8, dtype=torch.bfloat16))


def test_a_device_is_asked_once(gpu, stubs, monkeypatch):
    device, asked = gpu("sm90"), []
    monkeypatch.setattr(attention_backends.Library, "missing", lambda library: asked.append(library.package))
    for tokens in (103, 512, 103):
        choose_backend(device, torch.bfloat16, tokens, 64)
    assert sorted(asked) == ["flash-attn", "flash-attn 3", "flash-attn-4"]


def test_what_kernels_can_read_is_not_copied():
    qkv = torch.randn(2, 5, 3 * 2 * 8)
    for view in (*qkv.unflatten(-1, (3, 2, 8)).unbind(2), torch.randn(2, 2, 5, 8).transpose(1, 2)):
        assert readable(view) is view


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 5, 8, 2).transpose(2, 3),
        torch.randn(2, 5, 2, 9)[..., :8],
        torch.randn(2, 5, 2, 16)[..., 1:9],
    ],
    ids=["last stride", "row stride", "offset"],
)
def test_what_kernels_cannot_read_is_copied(x):
    copy = readable(x)
    assert copy.is_contiguous()
    torch.testing.assert_close(copy, x, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("shape", [(3, 103, 2, 64), (2, 513, 3, 32), (5, 1, 2, 8), (0, 5, 2, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_on_a_gpu(backend, dtype, shape):
    torch.use_deterministic_algorithms(BACKENDS[backend].deterministic)
    _, reasons = refusals(GPU, dtype, shape[1], shape[3])
    if reasons[backend] is not None:
        pytest.skip(f"{backend}: {reasons[backend]}")
    run = partial(flash_attention, backend=backend)
    qkv = torch.randn(*shape[:2], 3, *shape[2:], generator=torch.Generator().manual_seed(0)).to(GPU, dtype)
    tensors = dict(zip("qkv", qkv.unbind(2), strict=True))
    assert_kernel_accurate(run, partial(flash_attention, backend="math"), tensors, dtype)
    compiled = torch.compile(lambda **tensors: run(**tensors), fullgraph=True, backend="aot_eager")
    first, second, third = (with_gradients(function, tensors) for function in (run, run, compiled))
    if BACKENDS[backend].deterministic:
        torch.testing.assert_close((second, third), (first, first), rtol=0, atol=0)

from functools import partial

import pytest
import torch
from mae_kernels import flash_attention
from mae_kernels.ops.flash_attention import chosen, describe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import CALLS, torch_forms
from .tolerance import assert_same_function, with_gradients

# batch, tokens, heads, width of a head
SHAPES = [(2, 5, 2, 8), (1, 13, 3, 7), (3, 1, 1, 1), (2, 103, 2, 16), (0, 5, 2, 8), (2, 17, 5, 3)]

FORMS = [*({"impl": form} for form in torch_forms("flash_attention")), {"backend": "math"}, {"backend": "sdpa-flash"}]


def attend_head_by_head(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = []
    for head in range(q.shape[2]):
        logits = scale * q[:, :, head] @ k[:, :, head].transpose(1, 2)
        weights = (logits - logits.amax(dim=2, keepdim=True)).exp()
        heads.append(weights / weights.sum(dim=2, keepdim=True) @ v[:, :, head])
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_heads_one_by_one(shape, scale, form):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in "qkv"}
    assert_same_function(
        lambda **tensors: flash_attention(**tensors, scale=scale, **form),
        lambda **tensors: attend_head_by_head(**tensors, scale=scale),
        tensors,
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_tokens_give_none(form):
    results = with_gradients(partial(flash_attention, **form), dict.fromkeys("qkv", torch.zeros(2, 0, 3, 8)))
    assert {result.shape for result in results.values()} == {(2, 0, 3, 8)}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_views_of_a_packed_qkv(form):
    qkv = torch.randn(2, 7, 3 * 2 * 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_same_function(
        lambda qkv: flash_attention(*qkv.unflatten(-1, (3, 2, 5)).unbind(2), **form),
        lambda qkv: attend_head_by_head(*(part.unflatten(-1, (2, 5)) for part in qkv.chunk(3, dim=-1))),
        {"qkv": qkv},
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_heads_whose_values_are_apart_in_memory(form):
    tensors = {name: tensor.transpose(2, 3) for name, tensor in CALLS["flash_attention"].tensors.items()}
    assert not any(tensor.is_contiguous() for tensor in tensors.values())
    out = flash_attention(**tensors, **form)
    torch.testing.assert_close(out, attend_head_by_head(**tensors), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_large_logits_do_not_overflow(form):
    q = torch.full((1, 3, 1, 4), 30.0)
    k = torch.tensor([[1.0], [1.0], [-1.0]]).expand(3, 4)[None, :, None] * 30
    v = torch.tensor([1.0, 3.0, 100.0])[None, :, None, None].expand(1, 3, 1, 4)
    out = flash_attention(q, k, v.contiguous(), **form)
    torch.testing.assert_close(out, torch.full_like(out, 2.0))


class NameOperators(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "expected"), [("math", False), ("sdpa-flash", True)])
def test_a_backend_is_forced(backend, expected):
    call = CALLS["flash_attention"].to(torch.float32)
    with NameOperators() as ran:
        call(backend=backend)
    assert ("_scaled_dot_product_flash_attention_for_cpu.default" in ran.names) is expected
    assert ("bmm.default" in ran.names) is not expected


@pytest.mark.parametrize("backend", [None, "sdpa-flash"])
def test_compiles_once_for_any_number_of_tokens(backend):
    torch.compiler.reset()
    run = partial(chosen, scale=None, backend=backend)
    compiled = torch.compile(lambda **tensors: run(**tensors), fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5, 3, 8), (3, 103, 2, 8), (4, 17, 3, 16)):
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(shape, generator=generator) for name in "qkv"}
        with torch.compiler.set_stance("fail_on_recompile" if shape[0] > 2 else "default"):
            results = with_gradients(compiled, tensors)
        torch.testing.assert_close(results, with_gradients(run, tensors))


def test_the_choice_is_described():
    expected = "flash_attention: sdpa for 103 tokens: PyTorch picks the kernel"
    assert describe(torch.device("cpu"), torch.float32, 103, 64) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backend": "fa5"},
            "backend is 'fa5', expected one of 'fa4', 'fa3', 'fa2', 'sdpa-flash', 'sdpa-cudnn', 'sdpa-efficient', "
            "'math', 'sdpa'",
        ),
        (
            {"backend": "fa3"},
            "backend is 'fa3': runs on sm90, not on cpu; expected one of 'sdpa-flash', 'math', 'sdpa'",
        ),
        (
            {"backend": "math", "impl": "reference"},
            "backend is 'math' with impl 'reference', expected impl 'torch' or 'auto', which choose",
        ),
    ],
)
def test_a_backend_that_cannot_be_had_is_named(options, message):
    with pytest.raises(ValueError, match=f"^flash_attention: {message}$"):
        CALLS["flash_attention"](**options)


def test_the_triton_form_takes_what_the_rule_chooses():
    call = CALLS["flash_attention"].to(torch.float32)
    torch.testing.assert_close(call(impl="triton"), call(impl="torch"), rtol=0, atol=0)


@pytest.mark.parametrize("impl", torch_forms("flash_attention"))
@pytest.mark.parametrize("name", ["k", "v"])
def test_dtypes_that_differ_are_refused_but_under_autocast(name, impl):
    call = CALLS["flash_attention"].to(torch.float32)
    other = {name: call.tensors[name].bfloat16()}
    expected = f"^flash_attention: {name} has dtype torch.bfloat16, expected torch.float32, which q has$"
    with pytest.raises(TypeError, match=expected):
        call(**other, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(**other, impl=impl).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {name: torch.zeros(2, 5, 0, 8) for name in "qkv"},
            r"q has shape \(2, 5, 0, 8\), expected heads and d of at least 1",
        ),
        ({"q": torch.zeros(2, 5, 16)}, r"q has shape \(2, 5, 16\), expected \(B, N, heads, d\)"),
        (
            {"k": torch.zeros(2, 6, 2, 8)},
            r"k has shape \(2, 6, 2, 8\), expected \(B, N, heads, d\) with B = 2, N = 5, heads = 2, d = 8",
        ),
        (
            {"v": torch.zeros(2, 5, 2, 7)},
            r"v has shape \(2, 5, 2, 7\), expected \(B, N, heads, d\) with B = 2, N = 5, heads = 2, d = 8",
        ),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^flash_attention: {message}$"):
        CALLS["flash_attention"](**changes)

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mae_kernels import restore_tokens
from torch import Tensor

from .calls import CALLS, KERNEL_DEVICE, shuffled_rows, torch_forms
from .tolerance import assert_kernel_accurate, assert_same_function, with_gradients

# batch, visible, all, width
SHAPES = {
    "usual": (2, 4, 11, 8),
    "primes": (3, 5, 13, 7),
    "one": (1, 1, 1, 1),
    "all-visible": (2, 6, 6, 4),
    "none-visible": (2, 0, 5, 4),
    "no-clips": (0, 2, 5, 4),
}

# More of the same, around the sizes of the kernels' tiles: 256 values of a row, 8 rows of that many.
KERNEL_SHAPES = SHAPES | {
    "one-short": (2, 3, 7, 255),
    "one-more": (3, 2, 17, 257),
    "many-short-rows": (2, 90, 450, 5),
    "single-values": (2, 1, 3, 1),
    "only-the-class-token": (2, 0, 0, 4),
}


def restore_one_by_one(
    tokens: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    position: Tensor | None = None,
    *,
    has_cls: bool,
    keep_cls: bool,
) -> Tensor:
    """Each place takes its own visible token or the mask token, plus its row of the position table."""
    batch, length = ids_restore.shape
    visible = tokens[:, 1:] if has_cls else tokens
    out = tokens.new_zeros(batch, int(keep_cls) + length, tokens.shape[2])
    for b in range(batch):
        if keep_cls:
            out[b, 0] = tokens[b, 0]
            if position is not None and position.shape[0] == 1 + length:
                out[b, 0] += position[0]
        for i, place in enumerate(ids_restore[b].tolist()):
            token = visible[b, place] if place < visible.shape[1] else mask_token.flatten()
            out[b, int(keep_cls) + i] = token if position is None else token + position[i - length]
    return out


CLS = {
    "no-cls": {"has_cls": False, "keep_cls": False},
    "drop-cls": {"has_cls": True, "keep_cls": False},
    "keep-cls": {"has_cls": True, "keep_cls": True},
}


def arguments(
    batch: int, visible: int, length: int, dim: int, position: str | None, has_cls: bool
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"tokens": (batch, int(has_cls) + visible, dim), "mask_token": (1, 1, dim)}
    if position is not None:
        shapes["position"] = (length + int(has_cls and position == "all"), dim)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return tensors | {"ids_restore": shuffled_rows(batch, length)}


@pytest.mark.parametrize("impl", torch_forms("restore_tokens"))
@pytest.mark.parametrize("cls", CLS)
@pytest.mark.parametrize("position", [None, "patches", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_tokens_one_by_one(shape, position, cls, impl):
    assert_same_function(
        partial(restore_tokens, **CLS[cls], impl=impl),
        partial(restore_one_by_one, **CLS[cls]),
        arguments(*SHAPES[shape], position, CLS[cls]["has_cls"]),
    )


@pytest.mark.parametrize("impl", torch_forms("restore_tokens"))
def test_undoes_a_shuffle(impl):
    ids_shuffle = shuffled_rows(3, 7)
    x = torch.randn(3, 7, 5)
    shuffled = x.gather(1, ids_shuffle[:, :, None].expand_as(x))
    restored = restore_tokens(shuffled, ids_shuffle.argsort(dim=1), torch.zeros(5), has_cls=False, impl=impl)
    torch.testing.assert_close(restored, x, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)])
def test_a_mask_token_may_have_any_shape(shape):
    call = CALLS["restore_tokens"]
    torch.testing.assert_close(call(mask_token=call.tensors["mask_token"].view(shape)), call(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(5, 8)}, r"tokens has shape \(5, 8\), expected \(B, N, D\)"),
        (
            {"ids_restore": torch.zeros(3, 15).long()},
            r"ids_restore has shape \(3, 15\), expected \(B, L\) with B = 2",
        ),
        ({"tokens": torch.zeros(2, 17, 8)}, r"tokens holds 16 visible tokens, expected 0 to L = 15"),
        ({"tokens": torch.zeros(2, 0, 8)}, r"tokens holds -1 visible tokens, expected 0 to L = 15"),
        (
            {"has_cls": False},
            r"keep_cls is True with has_cls False, expected tokens with a class token",
        ),
        ({"mask_token": torch.zeros(1, 1, 7)}, r"mask_token has shape \(1, 1, 7\), expected D = 8 values"),
        ({"position": torch.zeros(14, 8)}, r"position has shape \(14, 8\), expected \(15, 8\) or \(16, 8\)"),
        ({"has_cls": False, "keep_cls": False}, r"position has shape \(16, 8\), expected \(15, 8\)"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^restore_tokens: {message}$"):
        CALLS["restore_tokens"](**changes)


@pytest.mark.parametrize("has_position", [False, True])
@pytest.mark.parametrize("tokens_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep_cls", [False, True])
def test_forms_agree_on_the_dtype_of_mixed_inputs(has_position, tokens_dtype, keep_cls):
    tokens = torch.randn(2, 4, 6).to(tokens_dtype)
    position = torch.randn(8, 6) if has_position else None
    ids_restore = torch.stack([torch.randperm(7), torch.randperm(7)])
    outputs = [
        restore_tokens(tokens, ids_restore, torch.randn(6), position, keep_cls=keep_cls, impl=impl)
        for impl in torch_forms("restore_tokens")
    ]
    assert len(outputs) > 1
    assert {output.dtype for output in outputs} == {torch.float32}


def on_device(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(KERNEL_DEVICE, dtype if t.is_floating_point() else None) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", CLS)
@pytest.mark.parametrize("position", [None, "patches", "all"])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernels_at_awkward_shapes(shape, position, cls, dtype):
    kernel, reference = (partial(restore_tokens, **CLS[cls], impl=impl) for impl in ("triton", "reference"))
    tensors = arguments(*KERNEL_SHAPES[shape], position, CLS[cls]["has_cls"])
    assert_kernel_accurate(kernel, reference, on_device(tensors, dtype), dtype)


@settings(deadline=None, max_examples=50)
@given(
    batch=st.integers(0, 9),
    length=st.integers(0, 40),
    share=st.floats(0, 1),
    dim=st.integers(1, 300),
    position=st.sampled_from([None, "patches", "all"]),
    cls=st.sampled_from(sorted(CLS)),
)
def test_kernels_copy_every_value_as_it_is(batch, length, share, dim, position, cls):
    tensors = arguments(batch, round(share * length), length, dim, position, CLS[cls]["has_cls"])
    tensors = on_device(tensors, torch.float32)
    results, expected = (
        with_gradients(partial(restore_tokens, **CLS[cls], impl=impl), tensors) for impl in ("triton", "reference")
    )
    for what in ("output 0", "gradient of tokens"):
        assert torch.equal(results[what], expected[what]), what
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("cls", CLS)
@pytest.mark.parametrize(
    "trained", [{"tokens", "mask_token"}, {"tokens"}, {"mask_token"}, {"position"}, set()], ids=lambda names: str(names)
)
def test_gradients_only_of_what_requires_them(trained, cls, impl):
    tensors = arguments(3, 4, 9, 6, "all", CLS[cls]["has_cls"])
    gradients = {}
    for form in (impl, "reference"):
        leaves = on_device(tensors, torch.float32)
        for name in trained:
            leaves[name].requires_grad_()
        restored = restore_tokens(**leaves, **CLS[cls], impl=form)
        assert restored.requires_grad == bool(trained)
        if trained:
            restored.square().sum().backward()
        gradients[form] = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients[impl].keys() == trained
    torch.testing.assert_close(gradients[impl], gradients["reference"])


@pytest.mark.parametrize("cls", CLS)
@pytest.mark.parametrize("position", [None, "patches", "all"])
def test_gradients_of_the_torch_form_are_those_of_its_differences(position, cls):
    tensors = arguments(2, 3, 5, 4, position, CLS[cls]["has_cls"])
    ids_restore = tensors.pop("ids_restore")
    names = list(tensors)

    def restore(*values):
        named = dict(zip(names, values, strict=True))
        return restore_tokens(ids_restore=ids_restore, **named, **CLS[cls], impl="torch")

    assert torch.autograd.gradcheck(restore, [tensor.requires_grad_() for tensor in tensors.values()], fast_mode=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("visible", [3, 5])
@pytest.mark.parametrize(
    "dtypes",
    [
        {"tokens": torch.bfloat16},
        {"tokens": torch.bfloat16, "mask_token": torch.bfloat16},
        {"tokens": torch.bfloat16, "position": torch.bfloat16},
        {"mask_token": torch.bfloat16, "position": torch.bfloat16},
    ],
    ids=str,
)
def test_dtypes_are_those_of_the_reference(dtypes, visible, autocast, impl):
    tensors = on_device(arguments(2, visible, 5, 6, "all", has_cls=True), torch.float32)
    tensors |= {name: tensors[name].to(dtype) for name, dtype in dtypes.items()}
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16, enabled=autocast):
        results, published = (
            with_gradients(partial(restore_tokens, impl=form), tensors) for form in (impl, "reference")
        )
    assert {what: t.dtype for what, t in results.items()} == {what: t.dtype for what, t in published.items()}


@pytest.mark.parametrize("keep_cls", [False, True])
def test_compiles_for_any_size(keep_cls):
    torch.compiler.reset()
    restore = partial(restore_tokens, keep_cls=keep_cls, impl="triton")
    compiled = torch.compile(restore, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in [(2, 3, 7, 6), (3, 5, 9, 10)]:
        tensors = on_device(arguments(*sizes, "all", has_cls=True), torch.float32)
        torch.testing.assert_close(with_gradients(compiled, tensors), with_gradients(restore, tensors))

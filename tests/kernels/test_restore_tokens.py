import pytest
import torch
from mae_kernels import restore_tokens
from torch import Tensor

from .calls import CALLS, shuffled_rows, torch_forms
from .tolerance import assert_same_function

# batch, visible, all, width
SHAPES = {
    "usual": (2, 4, 11, 8),
    "primes": (3, 5, 13, 7),
    "one": (1, 1, 1, 1),
    "all-visible": (2, 6, 6, 4),
    "none-visible": (2, 0, 5, 4),
    "no-clips": (0, 2, 5, 4),
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


@pytest.mark.parametrize("impl", torch_forms("restore_tokens"))
@pytest.mark.parametrize("cls", ["no-cls", "drop-cls", "keep-cls"])
@pytest.mark.parametrize("position", [None, "patches", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_tokens_one_by_one(shape, position, cls, impl):
    batch, visible, length, dim = SHAPES[shape]
    has_cls, keep_cls = cls != "no-cls", cls == "keep-cls"
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"tokens": (batch, int(has_cls) + visible, dim), "mask_token": (1, 1, dim)}
    if position is not None:
        shapes["position"] = (length + int(has_cls and position == "all"), dim)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["ids_restore"] = shuffled_rows(batch, length)
    assert_same_function(
        lambda **tensors: restore_tokens(**tensors, has_cls=has_cls, keep_cls=keep_cls, impl=impl),
        lambda **tensors: restore_one_by_one(**tensors, has_cls=has_cls, keep_cls=keep_cls),
        tensors,
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

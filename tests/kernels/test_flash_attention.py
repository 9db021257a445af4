import pytest
import torch
from mae_kernels import flash_attention
from torch import Tensor

from .calls import CALLS, torch_forms
from .tolerance import assert_same_function

# batch, tokens, heads, width of a head
SHAPES = [(2, 5, 2, 8), (1, 13, 3, 7), (3, 1, 1, 1), (2, 103, 2, 16), (0, 5, 2, 8), (2, 17, 5, 3)]


def attend_head_by_head(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = []
    for head in range(q.shape[2]):
        logits = scale * q[:, :, head] @ k[:, :, head].transpose(1, 2)
        weights = (logits - logits.amax(dim=2, keepdim=True)).exp()
        heads.append(weights / weights.sum(dim=2, keepdim=True) @ v[:, :, head])
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("impl", torch_forms("flash_attention"))
@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_heads_one_by_one(shape, scale, impl):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in "qkv"}
    assert_same_function(
        lambda **tensors: flash_attention(**tensors, scale=scale, impl=impl),
        lambda **tensors: attend_head_by_head(**tensors, scale=scale),
        tensors,
    )


@pytest.mark.parametrize("impl", torch_forms("flash_attention"))
def test_views_of_a_packed_qkv(impl):
    qkv = torch.randn(2, 7, 3 * 2 * 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_same_function(
        lambda qkv: flash_attention(*qkv.unflatten(-1, (3, 2, 5)).unbind(2), impl=impl),
        lambda qkv: attend_head_by_head(*(part.unflatten(-1, (2, 5)) for part in qkv.chunk(3, dim=-1))),
        {"qkv": qkv},
    )


@pytest.mark.parametrize("impl", torch_forms("flash_attention"))
def test_large_logits_do_not_overflow(impl):
    q = torch.full((1, 3, 1, 4), 30.0)
    k = torch.tensor([[1.0], [1.0], [-1.0]]).expand(3, 4)[None, :, None] * 30
    v = torch.tensor([1.0, 3.0, 100.0])[None, :, None, None].expand(1, 3, 1, 4)
    out = flash_attention(q, k, v.contiguous(), impl=impl)
    torch.testing.assert_close(out, torch.full_like(out, 2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mae_kernels import window_attention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor

from .calls import CALLS, torch_forms
from .tolerance import assert_same_function

FORMS = torch_forms("window_attention")
# grid, window, shift
LAYOUTS = [
    *(((6, 4), (3, 2), shift) for shift in product(range(3), range(2))),
    *(((5, 7), (3, 2), shift) for shift in product(range(3), range(2))),
    ((8, 8), (4, 4), (2, 2)),
    ((5, 6), (2, 5), (1, 3)),
    ((2, 3), (4, 4), (3, 1)),
    ((1, 1), (3, 3), (2, 2)),
    ((7, 1), (3, 1), (1, 0)),
    ((4, 3), (1, 1), (0, 0)),
]
LOGITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "scale-a-head": {"scale": "tensor"},
    "bias": {"bias": "tensor"},
    "cosine": {"cosine": True},
    "cosine-scale-bias": {"cosine": True, "scale": "tensor", "bias": "tensor"},
    "cosine-eps": {"cosine": True, "cosine_eps": 3.0},
}


def attend_token_by_token(
    qkv: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | float | None = None,
    *,
    num_heads: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    cosine: bool = False,
    cosine_eps: float = 1e-6,
) -> Tensor:
    """Each query's keys are found by whole-number arithmetic; padding is never there."""

    def place(index: int, size: int, side: int, step: int) -> tuple[int, int, bool]:
        """Window, place in the window, and whether the shift carried the index round to the end."""
        moved = (index - step) % (math.ceil(size / side) * side)
        return moved // side, moved % side, index < step

    places = [
        tuple(zip(*(place(*axis) for axis in zip(token, grid, window, shift, strict=True)), strict=True))
        for token in product(range(grid[0]), range(grid[1]))
    ]
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    if scale is None:
        scale = 1.0 if cosine else q.shape[-1] ** -0.5
    rows = []
    for i, (window_i, place_i, side_i) in enumerate(places):
        keys = [j for j, other in enumerate(places) if other[0] == window_i]
        logits = (q[:, i, None] * k[:, keys]).sum(dim=-1)
        if cosine:
            lengths = q[:, i, None].square().sum(dim=-1).sqrt() * k[:, keys].square().sum(dim=-1).sqrt()
            logits = logits / lengths.clamp(min=cosine_eps)
        logits = logits * scale
        if bias is not None:
            inside = [places[j][1][0] * window[1] + places[j][1][1] for j in keys]
            logits = logits + bias[:, place_i[0] * window[1] + place_i[1], inside].T
        logits = logits + torch.tensor([0.0 if places[j][2] == side_i else -100.0 for j in keys])[:, None]
        weights = logits.softmax(dim=1)
        rows.append((weights[..., None] * v[:, keys]).sum(dim=1).flatten(1))
    return torch.stack(rows, dim=1)


def arguments(
    layout: tuple, logits: str, *, batch: int = 2, num_heads: int = 3, head_dim: int = 5
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    grid, window, shift = layout
    generator = torch.Generator().manual_seed(0)
    area = window[0] * window[1]
    shapes = {"qkv": (batch, grid[0] * grid[1], 3 * num_heads * head_dim), "bias": (num_heads, area, area)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["scale"] = 0.5 + 4 * torch.rand(num_heads, generator=generator, dtype=torch.float64)
    settings = LOGITS[logits]
    options = {"num_heads": num_heads, "grid": grid, "window": window, "shift": shift}
    options |= {name: value for name, value in settings.items() if not isinstance(value, str)}
    return {name: t for name, t in tensors.items() if name == "qkv" or settings.get(name) == "tensor"}, options


def assert_equals_token_by_token(
    tensors: dict[str, Tensor], options: dict[str, Any], impl: str, run: Callable[..., Tensor] = window_attention
) -> None:
    assert_same_function(
        lambda **tensors: run(**tensors, **options, impl=impl),
        lambda **tensors: attend_token_by_token(**tensors, **options),
        tensors,
    )


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(layout, impl):
    assert_equals_token_by_token(*arguments(layout, "cosine-scale-bias"), impl)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("layout", [((6, 4), (3, 2), (0, 0)), ((5, 7), (3, 2), (2, 1))], ids=str)
def test_logits(layout, logits, impl):
    assert_equals_token_by_token(*arguments(layout, logits), impl)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(("batch", "num_heads", "head_dim"), [(0, 2, 4), (1, 1, 1), (3, 7, 2), (1, 2, 13)])
def test_batch_and_heads(batch, num_heads, head_dim, impl):
    layout = ((5, 4), (2, 3), (1, 2))
    sizes = {"batch": batch, "num_heads": num_heads, "head_dim": head_dim}
    assert_equals_token_by_token(*arguments(layout, "cosine-scale-bias", **sizes), impl)


@pytest.mark.parametrize("impl", FORMS)
def test_a_bias_can_reach_across_the_seam(impl):
    """The seam adds -100, as published code does, rather than forbid."""
    tensors, options = arguments(((6, 4), (3, 2), (1, 1)), "bias")
    tensors["bias"] *= 80
    assert_equals_token_by_token(tensors, options, impl)


@pytest.mark.parametrize("impl", FORMS)
def test_padding_is_never_attended_to(impl):
    """Not even where the bias lifts it far above every other key."""
    tensors, options = arguments(((3, 5), (2, 4), (1, 0)), "bias")
    tensors["bias"] *= 300
    assert_equals_token_by_token(tensors, options, impl)


@pytest.mark.parametrize("impl", FORMS)
def test_the_cosine_of_nothing_is_zero(impl):
    """Queries and keys of zeros meet ``cosine_eps``: their logits are 0 and every gradient is finite."""
    tensors, options = arguments(((4, 6), (2, 3), (0, 0)), "cosine")
    qkv = tensors["qkv"]
    qkv[0, :, :30] = 0
    qkv[1, ::3, :30] = 0
    out = window_attention(qkv.requires_grad_(), **options, impl=impl)
    windows = qkv.detach()[0, :, 30:].reshape(2, 2, 2, 3, 15)
    mean = windows.mean(dim=(1, 3), keepdim=True).expand_as(windows).reshape(24, 15)
    torch.testing.assert_close(out.detach()[0], mean, rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("layout", [((2, 4), (2, 2), (1, 1)), ((3, 2), (2, 2), (0, 0))], ids=str)
def test_gradients_of_the_torch_form_are_those_of_its_output(layout, logits):
    tensors, options = arguments(layout, logits, batch=1, num_heads=2, head_dim=3)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def run(*values: Tensor) -> Tensor:
        return window_attention(**dict(zip(tensors, values, strict=True)), **options, impl="torch")

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_the_torch_form_takes_samples_in_chunks(samples, monkeypatch):
    tensors, options = arguments(((5, 7), (3, 2), (2, 1)), "cosine-scale-bias", batch=5)
    nbytes = tensors["qkv"][:samples].nbytes
    monkeypatch.setattr("mae_kernels.ops.window_attention._CHUNK_BYTES", nbytes)
    assert_equals_token_by_token(tensors, options, "torch")


def test_the_torch_form_compiles_for_any_batch():
    """Without a graph break, and no more than once for all sizes but the first."""
    torch.compiler.reset()
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for batch in (2, 3, 5):
            tensors, options = arguments(((5, 4), (2, 3), (1, 2)), "cosine-scale-bias", batch=batch)
            assert_equals_token_by_token(tensors, options, "torch", compiled)


def swin(block: Any, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return block.attn.qkv(x), {"bias": block.attn._get_rel_pos_bias()[0]}


def temperature(block: Any) -> dict[str, Any]:
    scale = block.attn.logit_scale.flatten().clamp(max=math.log(100)).exp()
    return {"scale": scale, "cosine": True}


def swin_v2(block: Any, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    attn = block.attn
    qkv = F.linear(x, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, 3)
    bias = 16 * table[attn.relative_position_index].sigmoid().permute(2, 0, 1)
    return qkv, temperature(block) | {"bias": bias}


def swin_v2_cr(block: Any, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return block.attn.qkv(x), temperature(block) | {"bias": block.attn._relative_positional_encodings()[0]}


# The block and the name of its grid, its attention with shift and partition, and the operator's arguments.
TIMM = {
    "swin": (SwinTransformerBlock, "input_resolution", "_attn", swin),
    "swin-v2": (SwinTransformerV2Block, "input_resolution", "_attn", swin_v2),
    "swin-v2-cr": (SwinTransformerV2CrBlock, "feat_size", "_shifted_window_attn", swin_v2_cr),
}


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((8, 8), (4, 4), (0, 0)), ((8, 8), (4, 4), (2, 2)), ((16, 4), (4, 2), (2, 0)), ((6, 10), (3, 5), (1, 2))],
)
@pytest.mark.parametrize("name", TIMM)
def test_equals_timm(name, grid, window, shift, impl):
    """Where timm can follow: without padding, whose keys it attends to."""
    block_class, grid_name, attention, arguments_of = TIMM[name]
    block = block_class(dim=12, num_heads=3, window_size=window, **{grid_name: grid}).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    # timm itself turns every shift into half a window.
    block.shift_size = shift
    block.attn_mask = block.get_attn_mask(dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        qkv, settings = arguments_of(block, x.flatten(1, 2))
        out = window_attention(qkv, num_heads=3, grid=grid, window=window, shift=shift, impl=impl, **settings)
        return block.attn.proj(out).unflatten(1, grid)

    x = torch.randn(2, *grid, 12, generator=generator, dtype=torch.float64)
    assert_same_function(ours, getattr(block, attention), {"x": x})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(2, 5, 3, 24)}, r"qkv has shape \(2, 5, 3, 24\), expected \(B, L, 3C\)"),
        ({"grid": (5, 4)}, r"grid is \(5, 4\), expected a product of L = 15 tokens"),
        ({"grid": (15, 0)}, r"grid is \(15, 0\), expected one or two ints of at least 1"),
        ({"grid": (5, 3, 1)}, r"grid is \(5, 3, 1\), expected one or two ints of at least 1"),
        ({"num_heads": 5}, r"qkv has 24 channels, expected a multiple of 3 x num_heads = 5"),
        ({"num_heads": 0}, r"qkv has 24 channels, expected a multiple of 3 x num_heads = 0"),
        ({"window": 0}, r"window is 0, expected one or two ints of at least 1"),
        ({"window": (2, 2.0)}, r"window is \(2, 2\.0\), expected one or two ints of at least 1"),
        ({"shift": -1}, r"shift is -1, expected one or two ints of at least 0"),
        ({"shift": (0, 4)}, r"shift is \(0, 4\), expected less than the padded grid \(6, 4\) along each axis"),
        ({"bias": torch.zeros(4, 4)}, r"bias has shape \(4, 4\), expected \(2, 4, 4\)"),
        ({"bias": torch.zeros(1, 4, 4)}, r"bias has shape \(1, 4, 4\), expected \(2, 4, 4\)"),
        ({"scale": torch.ones(3)}, r"scale has shape \(3,\), expected \(2,\) or a number"),
        ({"scale": torch.ones(2, 1, 1)}, r"scale has shape \(2, 1, 1\), expected \(2,\) or a number"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^window_attention: {message}$"):
        CALLS["window_attention"](**changes)

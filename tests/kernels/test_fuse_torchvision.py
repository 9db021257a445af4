"""torchvision's Swin Transformer, V1 and V2, fused: the same numbers, the same meaning, and the same object."""

import copy
import io
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import torch
from mae_kernels.patching import parts, swin_torchvision
from mae_kernels.patching.core import fuse_targets, unfuse
from mae_kernels.patching.swin_torchvision import TARGETS
from torch import nn
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import MLP

from .fusing import (
    TORCH_FORMS,
    Adapter,
    assert_as_accurate,
    draw_state,
    function_of,
    fused_copy,
    on_device,
    paths,
    reasons,
)
from .tolerance import assert_same_function, with_gradients

CLASSES = {"v1": SwinTransformerBlock, "v2": SwinTransformerBlockV2}
ATTENTIONS = {"v1": ShiftedWindowAttention, "v2": ShiftedWindowAttentionV2}

# grid, window, shift
CUTS = {
    "whole": ((4, 6), [2, 3], [0, 0]),
    "shifted": ((6, 6), [3, 2], [1, 1]),
    "along rows": ((6, 4), [3, 2], [2, 0]),
    "along columns": ((6, 4), [3, 2], [0, 1]),
    "one window": ((3, 4), [3, 4], [1, 2]),
    "one window a row": ((6, 4), [3, 4], [1, 2]),
    "padded": ((5, 7), [3, 2], [1, 1]),
    "padded, not shifted": ((5, 7), [2, 4], [0, 0]),
    "smaller than a window": ((2, 3), [4, 4], [2, 2]),
}


def make_block(version: str, window: list[int], shift: list[int], **options) -> nn.Module:
    torch.manual_seed(0)
    return CLASSES[version](8, 2, window, shift, mlp_ratio=1.5, **options)


def shape_of(grid: tuple[int, int], batch: int = 2) -> tuple[int, ...]:
    return (batch, *grid, 8)


@pytest.mark.parametrize("impl", TORCH_FORMS)
@pytest.mark.parametrize("version", CLASSES)
@pytest.mark.parametrize("cut", CUTS)
def test_equals_the_block(cut, version, impl):
    grid, window, shift = CUTS[cut]
    block = make_block(version, window, shift)
    fused = fused_copy(block, TARGETS, impl)
    assert_same_function(function_of(fused), function_of(block), draw_state(block, shape_of(grid)))


@pytest.mark.parametrize("impl", TORCH_FORMS)
@pytest.mark.parametrize("version", CLASSES)
@pytest.mark.parametrize("cut", ["shifted", "padded"])
def test_is_as_accurate_as_the_block(cut, version, impl):
    grid, window, shift = CUTS[cut]
    block = make_block(version, window, shift)
    fused, tensors = fused_copy(block, TARGETS, impl), draw_state(block, shape_of(grid))
    assert_as_accurate(fused, block, tensors, torch.float32)
    assert_as_accurate(fused, block, tensors, torch.bfloat16)
    assert_as_accurate(fused, block, tensors, torch.bfloat16, autocast=True)


@pytest.mark.parametrize("version", CLASSES)
def test_kernels_are_as_accurate_as_the_block(version):
    block = make_block(version, [2, 2], [1, 0], stochastic_depth_prob=0.4)
    fused, tensors = fused_copy(block, TARGETS, "triton"), on_device(draw_state(block, shape_of((3, 2))))
    assert_as_accurate(fused, block, tensors, torch.float32, draws=1)
    assert_as_accurate(fused, block, tensors, torch.bfloat16, autocast=True, draws=1)


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"proj_bias": False}], ids=str)
@pytest.mark.parametrize("version", CLASSES)
def test_biases_may_be_missing(version, options):
    attention = ATTENTIONS[version](8, [3, 2], [1, 1], 2, **options)
    for impl in TORCH_FORMS:
        fused = fused_copy(attention, TARGETS, impl)
        assert_same_function(function_of(fused), function_of(attention), draw_state(attention, shape_of((5, 7))))


@pytest.mark.parametrize("version", CLASSES)
def test_the_bias_of_keys_in_v2_is_not_used(version):
    attention = ATTENTIONS[version](8, [3, 2], [1, 1], 2)
    fused, tensors = fused_copy(attention, TARGETS, "torch"), draw_state(attention, shape_of((6, 4)))
    tensors["qkv.bias"][8:16] = 5.0
    assert_same_function(function_of(fused), function_of(attention), tensors)
    gradient = with_gradients(function_of(fused), tensors)["gradient of qkv.bias"][8:16]
    assert (version == "v2") == bool((gradient == 0).all())


def test_a_large_logit_scale_is_clamped():
    attention = ShiftedWindowAttentionV2(8, [3, 2], [1, 1], 2)
    fused, tensors = fused_copy(attention, TARGETS, "torch"), draw_state(attention, shape_of((6, 4)))
    tensors["logit_scale"][0] = 7.0
    assert_same_function(function_of(fused), function_of(attention), tensors)
    gradient = with_gradients(function_of(fused), tensors)["gradient of logit_scale"].flatten()
    assert gradient[0] == 0
    assert gradient[1] != 0


@pytest.mark.parametrize("impl", TORCH_FORMS)
def test_short_queries_and_keys_have_cosines(impl):
    attention = ShiftedWindowAttentionV2(8, [3, 2], [1, 1], 2)
    fused, tensors = fused_copy(attention, TARGETS, impl), draw_state(attention, shape_of((6, 4)))
    for name in ("qkv.weight", "qkv.bias"):
        tensors[name][:16] *= 1e-8
    assert_same_function(function_of(fused), function_of(attention), tensors)


@pytest.mark.parametrize("version", CLASSES)
def test_stochastic_depth_and_dropout_draw_what_they_drew(version):
    grid, window, shift = CUTS["shifted"]
    block = make_block(version, window, shift, stochastic_depth_prob=0.4, dropout=0.3)
    fused = copy.deepcopy(block)
    assert reasons(fuse_targets(fused, TARGETS, "torch")) == {
        "attn": "dropout is 0.3, drawn in the order of windows",
        "mlp": "2 drops activations at a rate of 0.3",
    }
    tensors, states = draw_state(block, shape_of(grid, batch=5)), []
    for seed in range(3):
        assert_same_function(function_of(fused, seed=seed), function_of(block, seed=seed), tensors)
        for module in (fused, block):
            function_of(module, seed=seed)(**tensors)
            states.append(torch.get_rng_state())
        torch.testing.assert_close(states[-1], states[-2], rtol=0, atol=0)
    one, other = (function_of(fused, seed=seed)(**tensors) for seed in range(2))
    assert not torch.equal(one, other)
    for module in (fused, block):
        module.eval()
    assert_same_function(function_of(fused, seed=1), function_of(block, seed=2), tensors)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("version", CLASSES)
def test_stochastic_depth_in_low_precision(version, mode):
    grid, window, shift = CUTS["shifted"]
    block = make_block(version, window, shift, stochastic_depth_prob=0.4)
    block.stochastic_depth.mode = mode
    fused, tensors = fused_copy(block, TARGETS, "torch"), draw_state(block, shape_of(grid, batch=3))
    assert_as_accurate(fused, block, tensors, torch.float32)
    assert_as_accurate(fused, block, tensors, torch.bfloat16, autocast=True)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("attn", "attention_dropout"),
        ("attn", "dropout"),
        ("mlp.2", "p"),
        ("mlp.4", "p"),
        ("stochastic_depth", "p"),
    ],
)
@pytest.mark.parametrize("version", CLASSES)
def test_dropouts_that_are_turned_on_later_drop(version, path, name):
    grid, window, shift = CUTS["shifted"]
    block = make_block(version, window, shift)
    fused, tensors = fused_copy(block, TARGETS, "torch"), draw_state(block, shape_of(grid, batch=5))
    for module in (block, fused):
        setattr(module.get_submodule(path), name, 0.3)
    assert_same_function(function_of(fused), function_of(block), tensors)
    assert not torch.equal(function_of(fused, seed=1)(**tensors), function_of(fused, seed=2)(**tensors))


def small_swin(version: str, **options) -> SwinTransformer:
    torch.manual_seed(0)
    sizes = {"depths": [2, 2], "num_heads": [1, 2], "window_size": [4, 4], "mlp_ratio": 1.5, "num_classes": 5}
    merging = PatchMerging if version == "v1" else PatchMergingV2
    return SwinTransformer([2, 2], 8, block=CLASSES[version], downsample_layer=merging, **sizes | options)


IMAGE = (2, 3, 16, 20)  # 8 x 10 tokens, which are padded, then 4 x 5
NORM = {"v1": "add_layer_norm", "v2": "layer_norm_add"}


@pytest.mark.parametrize("impl", TORCH_FORMS)
@pytest.mark.parametrize("version", CLASSES)
def test_whole_model(version, impl):
    model = small_swin(version, stochastic_depth_prob=0.4)
    fused = copy.deepcopy(model)
    report = fuse_targets(fused, TARGETS, impl)
    parts = {"": NORM[version], ".attn": "window_attention", ".mlp": "mlp"}
    blocks = [f"features.{stage}.{i}" for stage in (1, 3) for i in (0, 1)]
    assert paths(report) == {f"{block}{part}": what for block in blocks for part, what in parts.items()}
    assert not report.left
    tensors = draw_state(model, IMAGE)
    assert_same_function(function_of(fused), function_of(model), tensors)
    assert_as_accurate(fused, model, tensors, torch.bfloat16, autocast=True)


@pytest.mark.parametrize("version", CLASSES)
def test_calls_the_operators(version):
    fused = fused_copy(small_swin(version), TARGETS, "reference")
    at = dict.fromkeys(("window_attention", "mlp"), swin_torchvision)
    at |= dict.fromkeys(("add_layer_norm", "layer_norm_add"), parts)
    expected = {"window_attention": 4, "mlp": 4, "add_layer_norm": 4, "layer_norm_add": 0}
    if version == "v2":
        expected |= {"add_layer_norm": 0, "layer_norm_add": 8}
    with ExitStack() as stack:
        calls = {
            name: stack.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))
            for name, module in at.items()
        }
        fused(torch.randn(IMAGE))
    assert {name: call.call_count for name, call in calls.items()} == expected
    assert {each.kwargs["impl"] for call in calls.values() for each in call.call_args_list} == {"reference"}


@pytest.mark.parametrize("version", CLASSES)
def test_stays_the_object_that_it_was(version):
    model = small_swin(version).eval()
    fused = fused_copy(model, TARGETS, "torch")
    x = torch.randn(IMAGE)
    expected, out = model(x), fused(x)
    block = fused.features[1][1]
    assert isinstance(block, CLASSES[version])
    assert isinstance(block.attn, ATTENTIONS[version])
    assert isinstance(block.mlp, MLP)
    assert list(fused.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(fused.state_dict(), model.state_dict(), rtol=0, atol=0)

    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(fused)):
        assert type(again.features[1][1]) is type(block)
        assert again.features[1][1].fused_impl == "torch"
        torch.testing.assert_close(again(x), out, rtol=0, atol=0)

    assert reasons(fuse_targets(fused, TARGETS, "torch")).keys() == paths(unfuse(fused)).keys()
    assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("version", CLASSES)
def test_compiles_without_a_graph_break(version):
    torch.compiler.reset()
    block = make_block(version, [3, 2], [1, 1], stochastic_depth_prob=0.4)
    fused = fused_copy(block, TARGETS, "torch")
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(shape_of((5, 7)))
    results = []
    for module in (compiled, block):
        torch.manual_seed(0)
        out = module(x)
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


class OwnForward(SwinTransformerBlock):
    def forward(self, x):
        return super().forward(x) * 2


class OwnBias(ShiftedWindowAttention):
    def get_relative_position_bias(self):
        return super().get_relative_position_bias() * 2


def hook(path: str, version: str = "v1") -> nn.Module:
    block = make_block(version, [3, 2], [1, 1])
    block.get_submodule(path).register_forward_hook(lambda module, arguments, out: 2 * out)
    return block


def adapt(version: str) -> nn.Module:
    block = make_block(version, [3, 2], [1, 1])
    block.mlp[0] = Adapter(block.mlp[0])
    return block


def without_depth(version: str) -> nn.Module:
    block = make_block(version, [3, 2], [1, 1], stochastic_depth_prob=0.4)
    block.stochastic_depth = nn.Identity()
    return block


FUSED_V1, FUSED_V2 = {"": "add_layer_norm"}, {"": "layer_norm_add"}
FUSED_ATTENTION, FUSED_MLP = {"attn": "window_attention"}, {"mlp": "mlp"}
PLAIN = partial(make_block, window=[3, 2], shift=[1, 1])
LEFT: dict[str, tuple[Callable[[], nn.Module], dict[str, str], dict[str, str]]] = {
    "adapter": (lambda: adapt("v1"), {"mlp": "0 is Adapter, expected Linear"}, FUSED_V1 | FUSED_ATTENTION),
    "hook on a norm": (
        lambda: hook("norm2"),
        {"": "norm2 has hooks, which would not run"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "hook on the first norm": (lambda: hook("norm1"), {}, FUSED_V1 | FUSED_ATTENTION | FUSED_MLP),
    "hook on the first norm of V2": (
        lambda: hook("norm1", "v2"),
        {"": "norm1 has hooks, which would not run"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "hook on stochastic depth": (
        lambda: hook("stochastic_depth"),
        {"": "stochastic_depth has hooks, which would not run"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "hook in an mlp": (
        lambda: hook("mlp.3"),
        {"mlp": "3 has hooks, which would not run"},
        FUSED_V1 | FUSED_ATTENTION,
    ),
    "hook where torchvision does not run it": (lambda: hook("attn.qkv"), {}, FUSED_V1 | FUSED_ATTENTION | FUSED_MLP),
    "no stochastic depth": (lambda: without_depth("v1"), {}, FUSED_V1 | FUSED_ATTENTION | FUSED_MLP),
    "no stochastic depth in V2": (lambda: without_depth("v2"), {}, FUSED_V2 | FUSED_ATTENTION | FUSED_MLP),
    "own forward": (
        lambda: OwnForward(8, 2, [3, 2], [1, 1]),
        {"": "OwnForward has a forward of its own"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "own bias": (
        lambda: PLAIN("v1", attn_layer=OwnBias),
        {},
        FUSED_V1 | FUSED_ATTENTION | FUSED_MLP,
    ),
    "attention dropout": (
        lambda: PLAIN("v2", attention_dropout=0.3),
        {"attn": "attention_dropout is 0.3"},
        FUSED_V2 | FUSED_MLP,
    ),
    "a shift of a window": (
        lambda: make_block("v1", [3, 2], [1, 2]),
        {"attn": "shift_size is (1, 2), expected 0 or more and less than the window (3, 2)"},
        FUSED_V1 | FUSED_MLP,
    ),
    "a norm without weights": (
        lambda: PLAIN("v1", norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
        {"": "norm2 has no weight or no bias"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "another norm": (
        lambda: PLAIN("v2", norm_layer=nn.RMSNorm),
        {"": "norm2 is RMSNorm, expected LayerNorm"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_fused_is_left(case):
    make, left, replaced = LEFT[case]
    torch.manual_seed(0)
    block = make()
    tensors = draw_state(block, shape_of((6, 4)))
    expected = with_gradients(function_of(block), tensors)
    report = fuse_targets(block, TARGETS, "torch")
    assert reasons(report) == left
    assert paths(report) == replaced
    results = with_gradients(function_of(block), tensors)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (MLP(8, [8]), "has 2 layers, expected 5: linear, GELU, dropout, linear, dropout"),
        (MLP(8, [8, 8]), "1 is ReLU, expected GELU"),
        (MLP(8, [8, 8], activation_layer=nn.GELU, bias=False), "0 has no bias"),
        (MLP(8, [8, 8], activation_layer=nn.GELU, dropout=0.3), "2 drops activations at a rate of 0.3"),
    ],
)
def test_other_mlps_are_left(mlp, reason):
    assert reasons(fuse_targets(mlp, TARGETS, "torch")) == {"": reason}


def test_the_mlp_of_torchvisions_vit_is_fused():
    block = EncoderBlock(2, 8, 12, dropout=0.0, attention_dropout=0.0, norm_layer=nn.LayerNorm)
    fused = fused_copy(block, TARGETS, "torch")
    assert isinstance(fused.mlp, swin_torchvision.SwinMlp)
    assert_same_function(function_of(fused), function_of(block), draw_state(block, (2, 7, 8)))

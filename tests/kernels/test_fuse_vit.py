"""timm's Vision Transformer fused: the same numbers, the same meaning, and the same object."""

import copy
import io
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from inspect import signature
from unittest import mock

import pytest
import timm
import torch
from mae_kernels.patching import parts, vit
from mae_kernels.patching.core import fuse_targets, unfuse
from mae_kernels.patching.vit import TARGETS
from timm.layers import Attention, Mlp, RmsNorm, get_act_layer
from timm.layers import LayerNorm as TimmLayerNorm
from timm.models.vision_transformer import Block
from torch import nn

from .calls import KERNEL_DEVICE
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


def explicit(block: Block) -> Block:
    """Without PyTorch's fused attention, timm goes by a scale that can be set."""
    block.attn.fused_attn, block.attn.scale = False, 0.3
    return block


def scale_in_place(block: Block) -> Block:
    block.ls1.inplace = block.ls2.inplace = True
    return block


BLOCKS: dict[str, Callable[[], Block]] = {
    "plain": lambda: Block(12, 3, mlp_ratio=1.5),
    "biased": lambda: Block(12, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-3)),
    "normed": lambda: Block(12, 2, qkv_bias=True, qk_norm=True, scale_attn_norm=True, init_values=0.5),
    "in place": lambda: scale_in_place(Block(12, 2, qkv_bias=True, init_values=0.5)),
    "explicit": lambda: explicit(Block(12, 2, qkv_bias=True, act_layer=get_act_layer("gelu"))),
    "dropping": lambda: Block(12, 2, qkv_bias=True, drop_path=0.4, init_values=0.5),
}
SHAPE = (5, 7, 12)


@pytest.fixture(params=BLOCKS)
def block(request) -> Block:
    torch.manual_seed(0)
    return BLOCKS[request.param]()


@pytest.mark.parametrize("impl", TORCH_FORMS)
def test_equals_the_block(block, impl):
    fused = fused_copy(block, TARGETS, impl)
    assert_same_function(function_of(fused), function_of(block), draw_state(block, SHAPE))


@pytest.mark.parametrize("impl", [*TORCH_FORMS, "triton"])
def test_is_as_accurate_as_the_block(block, impl):
    fused, tensors = fused_copy(block, TARGETS, impl), on_device(draw_state(block, SHAPE))
    assert_as_accurate(fused, block, tensors, torch.float32, draws=1)
    assert_as_accurate(fused, block, tensors, torch.bfloat16, draws=2)
    assert_as_accurate(fused, block, tensors, torch.bfloat16, autocast=True, draws=2)


@pytest.mark.parametrize("impl", [*TORCH_FORMS, "triton"])
def test_a_narrow_stream_widens_as_it_did(impl):
    """Under autocast a LayerScale gives float32, and so does the addition of it."""
    block = BLOCKS["normed"]().to(KERNEL_DEVICE)
    fused = fused_copy(block, TARGETS, impl)
    x = torch.randn(SHAPE, device=KERNEL_DEVICE, dtype=torch.bfloat16)
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        out, expected = fused(x), block(x)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


@pytest.mark.skipif("gated" not in signature(Attention).parameters, reason="this timm has no gates")
def test_a_gate_stays():
    attention = Attention(12, 2, gated=True, attn_head_dim=4, dim_out=5)
    fused = fused_copy(attention, TARGETS, "torch")
    assert_same_function(function_of(fused), function_of(attention), draw_state(attention, SHAPE))


def test_drop_paths_and_dropout_draw_what_they_drew():
    block = Block(12, 2, drop_path=0.4, proj_drop=0.3)
    fused = copy.deepcopy(block)
    assert reasons(fuse_targets(fused, TARGETS, "torch")) == {"mlp": "drop1 drops activations at a rate of 0.3"}
    tensors, states = draw_state(block, SHAPE), []
    for seed in range(3):
        assert_same_function(function_of(fused, seed=seed), function_of(block, seed=seed), tensors)
        for module in (fused, block):
            function_of(module, seed=seed)(**tensors)
            states.append(torch.get_rng_state())
        torch.testing.assert_close(states[-1], states[-2], rtol=0, atol=0)
    one, other = (function_of(fused, seed=seed)(**tensors) for seed in range(2))
    assert not torch.equal(one, other)


def test_nothing_is_dropped_in_eval():
    block = Block(12, 2, drop_path=0.4, proj_drop=0.3).eval()
    fused = copy.deepcopy(block)
    fuse_targets(fused, TARGETS, "torch")
    tensors = draw_state(block, SHAPE)
    assert_same_function(function_of(fused, seed=1), function_of(block, seed=2), tensors)


@pytest.mark.parametrize("path", ["attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"])
def test_dropouts_that_are_turned_on_later_drop(path):
    block = Block(12, 2)
    fused = fused_copy(block, TARGETS, "torch")
    for module in (block, fused):
        module.get_submodule(path).p = 0.3
    tensors = draw_state(block, SHAPE)
    assert_same_function(function_of(fused), function_of(block), tensors)
    assert not torch.equal(function_of(fused, seed=1)(**tensors), function_of(fused, seed=2)(**tensors))


BOOLEAN = torch.ones(7, 7, dtype=torch.bool).tril(2)


@pytest.mark.parametrize("explicitly", [False, True])
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {"attn_mask": None}),
        ((None, False), {}),
        ((BOOLEAN,), {}),
        ((), {"attn_mask": torch.randn(5, 1, 7, 7, dtype=torch.float64)}),
        ((), {"is_causal": True}),
    ],
)
def test_masks_hold(arguments, options, explicitly):
    block = Block(12, 2, qkv_bias=True)
    if "is_causal" not in signature(block.forward).parameters and (len(arguments) > 1 or "is_causal" in options):
        pytest.skip("this timm's blocks take no is_causal")
    if explicitly:
        explicit(block)
    fused, tensors = fused_copy(block, TARGETS, "torch"), draw_state(block, SHAPE)
    run, expected = (function_of(module, *arguments, **options) for module in (fused, block))
    assert_same_function(run, expected, tensors)
    masked = not torch.equal(run(**tensors), function_of(fused)(**tensors))
    assert masked == any(value is not None and value is not False for value in (*arguments, *options.values()))


def small_vit(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 24, "num_classes": 5} | options
    return timm.create_model("vit_tiny_patch16_224", **sizes)


IMAGE = (3, 3, 32, 32)


@pytest.mark.parametrize("impl", TORCH_FORMS)
def test_whole_model(impl):
    model = small_vit(drop_path_rate=0.3, init_values=0.5)
    fused = copy.deepcopy(model)
    report = fuse_targets(fused, TARGETS, impl)
    parts = {"": "add_layer_norm", ".attn": "flash_attention", ".mlp": "mlp"}
    assert paths(report) == {f"blocks.{i}{part}": what for i in range(2) for part, what in parts.items()}
    assert not report.left
    tensors = draw_state(model, IMAGE)
    assert_same_function(function_of(fused), function_of(model), tensors)
    assert_as_accurate(fused, model, tensors, torch.bfloat16, autocast=True)


def test_whole_model_with_kernels():
    model = small_vit(depth=1)
    fused = fused_copy(model, TARGETS, "triton")
    tensors = on_device(draw_state(model, IMAGE))
    assert_as_accurate(fused, model, tensors, torch.float32, draws=1)


def test_calls_the_operators():
    fused = fused_copy(small_vit(), TARGETS, "reference")
    with ExitStack() as stack:
        for name, module in (("add_layer_norm", parts), ("flash_attention", vit), ("mlp", vit)):
            calls = stack.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))
            fused(torch.randn(IMAGE))
            assert [call.kwargs["impl"] for call in calls.call_args_list] == ["reference"] * 2, name


def test_stays_the_object_that_it_was():
    model = small_vit()
    fused = fused_copy(model, TARGETS, "torch")
    x = torch.randn(IMAGE)
    expected, out = model(x), fused(x)
    assert isinstance(fused.blocks[0], Block)
    assert isinstance(fused.blocks[0].attn, Attention)
    assert isinstance(fused.blocks[0].mlp, Mlp)
    assert list(fused.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(fused.state_dict(), model.state_dict(), rtol=0, atol=0)

    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(fused)):
        assert type(again.blocks[0]) is type(fused.blocks[0])
        assert again.blocks[0].fused_impl == "torch"
        torch.testing.assert_close(again(x), out, rtol=0, atol=0)

    assert reasons(fuse_targets(fused, TARGETS, "torch")).keys() == paths(unfuse(fused)).keys()
    assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=0)


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    model = small_vit(drop_path_rate=0.4, init_values=0.5)
    fused, x = fused_copy(model, TARGETS, "torch"), torch.randn(IMAGE)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    results = []
    for module in (compiled, model):
        torch.manual_seed(0)
        out = module(x)
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


class OwnForward(Block):
    def forward(self, x, *arguments, **options):
        return super().forward(x, *arguments, **options) * 2


class OwnAttention(Attention):
    def forward(self, x, *arguments, **options):
        return -super().forward(x, *arguments, **options)


class MeanAttention(nn.Module):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x.mean(dim=1, keepdim=True).expand_as(x)


def with_attention(attention: nn.Module) -> Block:
    block = Block(12, 2)
    block.attn = attention
    return block


def adapt(block: Block) -> Block:
    block.mlp.fc1, block.attn.qkv = Adapter(block.mlp.fc1), Adapter(block.attn.qkv)
    return block


def hook(path: str) -> Block:
    block = Block(12, 2)
    block.get_submodule(path).register_forward_hook(lambda module, arguments, out: 2 * out)
    return block


def replaced_forward() -> Block:
    block = Block(12, 2)
    forward = block.attn.forward
    block.attn.forward = lambda *arguments, **options: 2 * forward(*arguments, **options)
    return block


def fast_norm(block: Block) -> Block:
    block.norm2._fast_norm = True
    return block


FUSED_ATTENTION, FUSED_MLP = {"attn": "flash_attention"}, {"mlp": "mlp"}
FUSED_BLOCK = {"": "add_layer_norm"}
LEFT = {
    "adapter": (
        lambda: adapt(Block(12, 2)),
        {"mlp": "fc1 is Adapter, expected Linear"},
        FUSED_BLOCK | FUSED_ATTENTION,
    ),
    "hook on a norm": (
        lambda: hook("norm2"),
        {"": "norm2 has hooks, which would not run"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "hook in an mlp": (
        lambda: hook("mlp.act"),
        {"mlp": "act has hooks, which would not run"},
        FUSED_BLOCK | FUSED_ATTENTION,
    ),
    "hook on the attention's dropout": (
        lambda: explicit(hook("attn.attn_drop")),
        {"attn": "attn_drop has hooks, which would not run"},
        FUSED_BLOCK | FUSED_MLP,
    ),
    "hook on a part that is called": (lambda: hook("attn.qkv"), {}, FUSED_BLOCK | FUSED_ATTENTION | FUSED_MLP),
    "hook on a drop path": (
        lambda: hook("drop_path1"),
        {"": "drop_path1 has hooks, which would not run"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "own forward": (
        lambda: OwnForward(12, 2),
        {"": "OwnForward has a forward of its own"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "own attention": (
        lambda: with_attention(OwnAttention(12, 2)),
        {"attn": "OwnAttention has a forward of its own"},
        FUSED_BLOCK | FUSED_MLP,
    ),
    "other attention": (lambda: with_attention(MeanAttention()), {}, FUSED_BLOCK | FUSED_MLP),
    "replaced forward": (replaced_forward, {"attn": "its forward was replaced"}, FUSED_BLOCK | FUSED_MLP),
    "attention dropout": (
        lambda: Block(12, 2, attn_drop=0.3),
        {"attn": "attn_drop drops attention at a rate of 0.3"},
        FUSED_BLOCK | FUSED_MLP,
    ),
    "another norm": (
        lambda: Block(12, 2, norm_layer=RmsNorm),
        {"": "norm2 is RmsNorm, expected LayerNorm"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "a norm without a bias": (
        lambda: Block(12, 2, norm_layer=partial(nn.LayerNorm, bias=False)),
        {"": "norm2 has no weight or no bias"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "a norm of many axes": (
        lambda: Block(12, 2, norm_layer=lambda dim, **_: nn.LayerNorm((7, dim))),
        {"": "norm2 normalises 2 axes, expected 1"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "a fast norm": (
        lambda: fast_norm(Block(12, 2, norm_layer=TimmLayerNorm)),
        {"": "norm2 is a fast norm, whose dtype under autocast is another"},
        FUSED_ATTENTION | FUSED_MLP,
    ),
    "another activation": (
        lambda: Block(12, 2, act_layer=nn.ReLU),
        {"mlp": "act is ReLU, expected GELU"},
        FUSED_BLOCK | FUSED_ATTENTION,
    ),
    "an approximate activation": (
        lambda: Block(12, 2, act_layer=partial(nn.GELU, approximate="tanh")),
        {"mlp": "act is GELU by its tanh approximation, expected the exact one"},
        FUSED_BLOCK | FUSED_ATTENTION,
    ),
    "no bias in the mlp": (
        lambda: Block(12, 2, proj_bias=False),
        {"mlp": "fc1 has no bias"},
        FUSED_BLOCK | FUSED_ATTENTION,
    ),
    "a norm in the mlp": (
        lambda: Block(12, 2, scale_mlp_norm=True),
        {"mlp": "norm is LayerNorm, expected Identity"},
        FUSED_BLOCK | FUSED_ATTENTION,
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_fused_is_left(case):
    make, left, replaced = LEFT[case]
    torch.manual_seed(0)
    block = make()
    tensors = draw_state(block, SHAPE)
    expected = with_gradients(function_of(block), tensors)
    report = fuse_targets(block, TARGETS, "torch")
    assert reasons(report) == left
    assert paths(report) == replaced
    results = with_gradients(function_of(block), tensors)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-11)


def test_an_mlp_of_convolutions_is_left():
    report = fuse_targets(Mlp(12, use_conv=True), TARGETS, "torch")
    assert reasons(report) == {"": "fc1 is Conv2d, expected Linear"}


def test_an_unknown_version_is_left():
    block = Block(12, 2)
    block.drop_path = block.drop_path1
    del block.drop_path1
    report = fuse_targets(block, TARGETS, "torch")
    expected = "not as in the version that is known: 'Block' object has no attribute 'drop_path1'"
    assert reasons(report) == {"": expected}

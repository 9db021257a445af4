"""Blocks of timm's Swin that cannot be fused, and why; and those that can though something is unusual."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mae_kernels.patching import swin_timm
from mae_kernels.patching.core import fuse_targets
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import nn

from .fusing import paths, reasons
from .swin_blocks import CLASSES, KINDS, SHIFTED, SIZE, WIDTH, assert_same, fuse, make, tokens


class AnotherAttention(nn.Module):
    pass


class OwnAttention(SwinTransformerV2Block):
    def _attn(self, x):
        return super()._attn(x)


def set_shift(block: Any) -> None:
    block.shift_size = (1, 0)


def set_mask(block: Any) -> None:
    block.attn_mask[0, 0, 1] = -1


def hook(path: str) -> Callable[[nn.Module], object]:
    return lambda block: block.get_submodule(path).register_forward_hook(lambda *_: None)


def put(path: str, module: Any) -> Callable[[nn.Module], object]:
    return lambda block: block.set_submodule(path, module)


def put_attribute(name: str, value: Any, path: str = "") -> Callable[[nn.Module], object]:
    return lambda block: setattr(block.get_submodule(path), name, value)


MASK = r"attn_mask is not that of window_size \(2, 2\) and shift_size"
REFUSALS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "shift-without-its-mask": (set_shift, rf"{MASK} \(1, 0\)"),
    "mask-without-its-shift": (put_attribute("shift_size", (0, 0)), rf"{MASK} \(0, 0\)"),
    "another-mask": (set_mask, rf"{MASK} \(1, 1\)"),
    "mask-of-another-grid": (put_attribute("attn_mask", torch.zeros(1, 4, 4)), rf"{MASK} \(1, 1\)"),
    "no-mask": (put_attribute("attn_mask", None), "has no attn_mask, and a shift_size"),
    "negative-shift": (put_attribute("shift_size", (-1, 0)), r"shift_size is \(-1, 0\), expected 0 or more and less"),
    "large-shift": (put_attribute("shift_size", (1, 4)), r"shift_size is \(1, 4\), .* the padded grid \(4, 4\)"),
    "attention-dropout": (put_attribute("p", 0.1, "attn.attn_drop"), "attn.attn_drop drops attention at a rate of 0.1"),
    "another-attention": (put("attn", AnotherAttention()), "attn is AnotherAttention, expected timm.models.swin_trans"),
    "attention-replaced": (put_attribute("forward", lambda x: x, "attn"), "the forward of attn was replaced"),
    "forward-replaced": (put_attribute("forward", lambda x: x), "its forward was replaced"),
    "adapter": (put("attn.qkv", nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH))), "attn.qkv is Sequential, expected Linear"),
    "hook-of-attention": (hook("attn"), "attn has hooks, which would not run"),
    "hook-of-its-weights": (hook("attn.attn_drop"), "attn.attn_drop has hooks, which would not run"),
    "hook-of-its-projection": (hook("attn.proj"), "attn.proj has hooks, which would not run"),
    "hook-of-a-norm": (hook("norm2"), "norm2 has hooks, which would not run"),
    "another-norm": (put("norm2", nn.BatchNorm1d(WIDTH)), "norm2 is BatchNorm1d, expected LayerNorm"),
    "plain-norm": (put("norm2", nn.LayerNorm(WIDTH, bias=False)), "norm2 has no weight or no bias"),
    "another-drop-path": (put("drop_path1", nn.Dropout(0.1)), "drop_path1 is Dropout, expected Identity"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_fused_is_left(kind, refusal):
    change, reason = REFUSALS[refusal]
    block = make(kind, (4, 4), **SHIFTED)
    change(block)
    report = fuse_targets(nn.Sequential(block), swin_timm.TARGETS, "torch")
    assert not report.replaced
    assert re.match(reason, reasons(report)["0"]), report
    assert type(block) is CLASSES[kind]


@pytest.mark.parametrize("kind", ["v2", "v2-cr"])
@pytest.mark.parametrize(
    ("path", "part", "reason"),
    [
        ("norm1", nn.BatchNorm1d(WIDTH), "norm1 is BatchNorm1d, expected LayerNorm"),
        ("drop_path2", nn.Dropout(0.1), "drop_path2 is Dropout, expected Identity"),
    ],
)
def test_post_norm_block_needs_all_norms_and_drop_paths(kind, path, part, reason):
    block = make(kind, (4, 4), **SHIFTED)
    block.set_submodule(path, part)
    assert reasons(fuse_targets(block, swin_timm.TARGETS, "torch")) == {"": reason}


def test_what_is_of_one_class_alone_is_left():
    block = make("v2-cr", (4, 4), sequential_attn=True, **SHIFTED)
    assert reasons(fuse(block))[""] == "attn is sequential"
    for kind in ("v1", "v2"):
        block = make(kind, (4, 4), **SHIFTED)
        hook("attn.softmax")(block)
        assert reasons(fuse(block)) == {"": "attn.softmax has hooks, which would not run"}


def test_subclass_with_attention_of_its_own_is_left():
    block = OwnAttention(WIDTH, (4, 4), num_heads=3, window_size=2)
    assert reasons(fuse(block)) == {"": "OwnAttention has a _attn of its own"}


@pytest.mark.parametrize("kind", KINDS)
def test_mask_of_a_subclass_is_not_taken_for_timm_s(kind):
    class OwnMask(CLASSES[kind]):
        def get_attn_mask(self, *arguments, **options):
            mask = super().get_attn_mask(*arguments, **options)
            return None if mask is None else 2 * mask

    for dynamic in (True, False):
        block = OwnMask(WIDTH, num_heads=3, dynamic_mask=dynamic, **{SIZE[kind]: (4, 4)}, **SHIFTED)
        assert re.match(MASK, reasons(fuse(block))[""])


def test_class_of_another_version_is_left():
    block = make("v1", (4, 4))
    del block.dynamic_mask  # which timm has since 1.0.15
    assert reasons(fuse(block))[""].startswith("not as in the version that is known: ")


@pytest.mark.parametrize("kind", KINDS)
def test_block_without_storage_is_fused(kind):
    with torch.device("meta"):
        block = CLASSES[kind](WIDTH, num_heads=3, **{SIZE[kind]: (4, 4)}, **SHIFTED)
    assert "" in paths(fuse(block))
    block.to_empty(device="cpu")
    expected = make(kind, (4, 4), **SHIFTED)
    block.load_state_dict(expected.state_dict())
    for module in block.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert_same(block.double().eval(), expected.double().eval(), tokens((4, 4)).double())

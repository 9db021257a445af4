"""The transcribed classifier against timm's VisionTransformer, an independent witness."""

from functools import partial
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .classifier_transcription import classifier_logits, official_classifier_state

HEADS, CLASSES = 3, 7
SIZES: dict[str, Any] = {"depth": 2, "dim": 48, "heads": HEADS, "mlp_ratio": 4.0, "classes": CLASSES}
LAYER_NORM: Any = partial(torch.nn.LayerNorm, eps=1e-6)
# (grid, patch): more time than mel and the other way round, square and not
GRIDS = [((8, 3), (16, 16)), ((3, 5), (4, 6))]


def case(grid: tuple[int, int], patch: tuple[int, int], **sizes: Any) -> tuple[dict[str, Tensor], Tensor]:
    state = official_classifier_state(3, grid=grid, patch=patch, **{**SIZES, **sizes})
    generator = torch.Generator().manual_seed(4)
    spec = torch.randn(2, 1, grid[0] * patch[0], grid[1] * patch[1], generator=generator, dtype=torch.float64)
    return state, spec


def timm_logits(
    state: dict[str, Tensor], spec: Tensor, patch: tuple[int, int], ids_keep: Tensor | None, **sizes: Any
) -> Tensor:
    """The same by timm: it has no dropping by ids, so its parts are called one after the other."""
    sizes = {**SIZES, **sizes}
    model = VisionTransformer(
        img_size=tuple(spec.shape[2:]),
        patch_size=patch,
        in_chans=1,
        num_classes=sizes["classes"],
        global_pool="avg",
        embed_dim=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        mlp_ratio=sizes["mlp_ratio"],
        class_token=True,
        fc_norm=True,
        norm_layer=LAYER_NORM,
    )
    model.load_state_dict(state, strict=True)
    model.double().eval()
    if ids_keep is None:
        return model(spec)
    x = model._pos_embed(model.patch_embed(spec))
    kept = torch.stack([clip[[0, *(1 + ids).tolist()]] for clip, ids in zip(x, ids_keep, strict=True)])
    return model.forward_head(model.norm(model.blocks(kept)))


def drawn_ids(length: int, keep: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(length, generator=generator)[:keep] for _ in range(2)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"depth": 1, "dim": 40, "heads": 5, "mlp_ratio": 2.5, "classes": 2}])
@pytest.mark.parametrize(("grid", "patch"), GRIDS)
def test_the_logits_are_those_of_timm(grid, patch, sizes, masked):
    state, spec = case(grid, patch, **sizes)
    ids_keep = drawn_ids(grid[0] * grid[1], 7) if masked else None
    expected = timm_logits(state, spec, patch, ids_keep, **sizes)
    logits = classifier_logits(state, spec, sizes.get("heads", HEADS), ids_keep)
    assert logits.dtype == torch.float64
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_masks_drop_tokens_in_any_order():
    state, spec = case(*GRIDS[0])
    everything = classifier_logits(state, spec, HEADS)
    torch.testing.assert_close(classifier_logits(state, spec, HEADS, drawn_ids(24, 24)), everything, rtol=0, atol=1e-9)
    some = drawn_ids(24, 10)
    logits = classifier_logits(state, spec, HEADS, some)
    torch.testing.assert_close(classifier_logits(state, spec, HEADS, some.flip(1)), logits, rtol=0, atol=1e-9)
    assert (logits - everything).abs().max() > 0.01
    # What was dropped has no influence at all.
    dropped = next(token for token in range(24) if token not in some[0].tolist())
    t, f = divmod(dropped, 3)
    spec[0, 0, 16 * t : 16 * (t + 1), 16 * f : 16 * (f + 1)] = 100.0
    assert torch.equal(classifier_logits(state, spec, HEADS, some), logits)


def test_the_state_is_that_of_an_official_file():
    state = official_classifier_state(1, depth=2, dim=48, heads=3, mlp_ratio=4.0, grid=(4, 8), classes=50)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    blocks = {
        "norm1.weight": (48,),
        "norm1.bias": (48,),
        "attn.qkv.weight": (144, 48),
        "attn.qkv.bias": (144,),
        "attn.proj.weight": (48, 48),
        "attn.proj.bias": (48,),
        "norm2.weight": (48,),
        "norm2.bias": (48,),
        "mlp.fc1.weight": (192, 48),
        "mlp.fc1.bias": (192,),
        "mlp.fc2.weight": (48, 192),
        "mlp.fc2.bias": (48,),
    }
    assert shapes == {
        "cls_token": (1, 1, 48),
        "pos_embed": (1, 33, 48),
        "patch_embed.proj.weight": (48, 1, 16, 16),
        "patch_embed.proj.bias": (48,),
        **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in blocks.items()},
        "fc_norm.weight": (48,),
        "fc_norm.bias": (48,),
        "head.weight": (50, 48),
        "head.bias": (50,),
    }
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    again = official_classifier_state(1, depth=2, dim=48, heads=3, mlp_ratio=4.0, grid=(4, 8), classes=50)
    other = official_classifier_state(2, depth=2, dim=48, heads=3, mlp_ratio=4.0, grid=(4, 8), classes=50)
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        assert tensor.std() > 0.05, name


@pytest.mark.parametrize("name", list(case(*GRIDS[1])[0]))
def test_every_parameter_counts(name):
    state, spec = case(*GRIDS[1])
    logits = classifier_logits(state, spec, HEADS)
    generator = torch.Generator().manual_seed(6)
    state[name] = state[name] + 0.3 * torch.randn(state[name].shape, generator=generator)
    assert (classifier_logits(state, spec, HEADS) - logits).abs().max() > 1e-3


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^5 heads do not divide dim 48$"):
        official_classifier_state(1, grid=(4, 8), **{**SIZES, "heads": 5})
    state, spec = case(*GRIDS[0])
    with pytest.raises(ValueError, match=r"^112 x 48 values do not make 24 patches of 16 x 16$"):
        classifier_logits(state, spec[:, :, :112], HEADS)
    with pytest.raises(ValueError, match=r"^127 x 48 values do not make 24 patches of 16 x 16$"):
        classifier_logits(state, spec[:, :, :127], HEADS)

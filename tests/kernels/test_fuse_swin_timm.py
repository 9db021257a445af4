"""timm's Swin Transformers, V1, V2 and V2-CR, with fused blocks: the same numbers, and what is left to the class."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mae_kernels.patching import swin_timm
from mae_kernels.patching.core import Fused, unfuse
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn

from .calls import KERNEL_DEVICE
from .fusing import paths, reasons
from .swin_blocks import (
    CASES,
    CLASSES,
    KINDS,
    SHIFTED,
    WIDTH,
    assert_as_accurate,
    assert_same,
    fuse,
    fused_copy,
    make,
    past_the_clamp,
    results,
    spread,
    tokens,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The grids of the calls of ``window_attention``."""
    grids: list[tuple[int, int]] = []
    attend = swin_timm.window_attention

    def record(*arguments: Any, **options: Any) -> Tensor:
        grids.append(options["grid"])
        return attend(*arguments, **options)

    monkeypatch.setattr(swin_timm, "window_attention", record)
    return grids


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("case", "impl"),
    [(case, "torch") for case in CASES] + [(case, "reference") for case in CASES if case.endswith("-shifted")],
)
def test_numbers_are_the_same(case, impl, calls):
    kind, grid, options = CASES[case]
    block = past_the_clamp(make(kind, grid, drop_path=0.4, **options)).double()
    fused = fused_copy(block, impl)
    for training in (True, False):
        assert_same(fused.train(training), block.train(training), tokens(grid).double())
    assert len(calls) == (0 if case == "v2-cr-padded-and-shifted" else 2)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in CASES]
    + [(case, torch.float32) for case in CASES if case.endswith(("-shifted", "-windows"))],
    ids=str,
)
def test_low_precision_costs_no_more(case, dtype):
    kind, grid, options = CASES[case]
    block = make(kind, grid, drop_path=0.4, **options)
    assert_as_accurate(fused_copy(block), block, tokens(grid), dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("v1", torch.float32), ("v1", torch.bfloat16), ("v2", torch.float32), ("v2-cr", torch.bfloat16)],
    ids=str,
)
def test_kernels_give_the_same(kind, dtype):
    options = {"num_heads": 1, "window_size": (2, 2), "shift_size": (1, 1), "drop_path": 0.4}
    block = make(kind, (4, 2), **options).to(KERNEL_DEVICE)
    x = tokens((4, 2)).to(KERNEL_DEVICE)
    assert_as_accurate(fused_copy(block, "triton"), block, x, dtype, draws=2)


def test_kernels_take_padding_whose_keys_are_zero():
    block = make("v2", (3, 1), num_heads=1, window_size=(2, 1), shift_size=(1, 0)).to(KERNEL_DEVICE)
    x = tokens((3, 1), batch=1).to(KERNEL_DEVICE)
    assert_as_accurate(fused_copy(block, "triton"), block, x, torch.float32)


def test_separate_bias_is_added_after_the_projection():
    block = make("v2", (4, 4), **SHIFTED)
    block.attn.qkv_bias_separate = True
    assert_as_accurate(fused_copy(block), block, tokens((4, 4)), torch.bfloat16)
    assert_same(fused_copy(block.double()), block, tokens((4, 4)).double())


@pytest.mark.parametrize("is_fused_attn", [True, False])
def test_scale_is_what_the_attention_goes_by(is_fused_attn):
    block = make("v1", (4, 4), **SHIFTED).double()
    block.attn.fused_attn, block.attn.scale = is_fused_attn, 0.25
    assert_same(fused_copy(block), block, tokens((4, 4)).double())


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("shift", [0, 2])
def test_another_grid_is_masked_as_the_class_does(kind, shift, dynamic, calls):
    block = make(kind, (8, 8), window_size=4, shift_size=shift, dynamic_mask=dynamic).double()
    fused = fused_copy(block)
    # With the mask of 8 x 8, that of 4 x 16 tokens has the right number of windows, and is wrong: timm's numbers stay.
    for grid in ((4, 16), (7, 6), (5, 8)):
        assert_same(fused, block, tokens(grid).double())
    expected = [(4, 16), (8, 8), (8, 8)]
    assert calls == (expected if dynamic or not shift else expected[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", ["attn_drop", "proj_drop"])
def test_dropout_is_drawn_as_the_class_does(kind, drop, calls):
    block = make(kind, (4, 4), proj_drop=0.3 if drop == "proj_drop" else 0, **SHIFTED).double()
    fused = fused_copy(block)
    block.attn.get_submodule(drop).p = fused.attn.get_submodule(drop).p = 0.3  # attention's is refused when fusing
    assert_same(fused, block, tokens((4, 4)).double())
    assert not calls
    assert_same(fused.eval(), block.eval(), tokens((4, 4)).double())
    assert calls


@pytest.mark.parametrize("kind", KINDS)
def test_shift_that_is_set_or_taken_away_is_the_class_s(kind, calls):
    for shift, other in (((1, 1), (0, 0)), ((0, 0), (1, 1))):
        block = make(kind, (4, 4), window_size=(2, 2), shift_size=shift).double()
        fused = fused_copy(block)
        block.shift_size = fused.shift_size = other
        assert_same(fused, block, tokens((4, 4)).double())
    assert not calls


@pytest.mark.parametrize("kind", KINDS)
def test_resized_block_goes_on(kind, calls):
    block = make(kind, (8, 8), window_size=(4, 4), shift_size=(2, 2)).double()
    fused = fused_copy(block)
    for module in (block, fused):
        module.set_input_size((6, 9), (2, 3))
    assert_same(fused, block, tokens((6, 9)).double())
    assert calls == [(6, 9)]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_parts_run(kind):
    block = fused_copy(make(kind, (4, 4), **SHIFTED))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("mlp", "drop_path2") if kind == "v1" else ("mlp",):
        block.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: shapes.update({name: tuple(out.shape)})
        )
    block(tokens((4, 4)))
    assert shapes
    assert set(shapes.values()) == {(2, 16, WIDTH)}


@pytest.mark.parametrize("kind", KINDS)
def test_strided_input_gives_the_same(kind):
    block = make(kind, (4, 6), **SHIFTED).double()
    x = tokens((4, 6)).double().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    assert_same(fused_copy(block), block, x)


@pytest.mark.parametrize("kind", KINDS)
def test_block_stays_what_it_was(kind):
    block = make(kind, (4, 4), drop_path=0.4, **SHIFTED)
    fused, x = fused_copy(block), tokens((4, 4))
    assert isinstance(fused, CLASSES[kind])
    assert isinstance(fused, Fused)
    assert list(fused.state_dict()) == list(block.state_dict())
    torch.testing.assert_close(fused.state_dict(), block.state_dict(), rtol=0, atol=0)

    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    expected = results(fused, x)
    for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert type(other) is type(fused)
        torch.testing.assert_close(results(other, x), expected, rtol=0, atol=0)

    report = unfuse(fused)
    assert len(report.replaced) == 2  # and the MLP
    assert type(fused) is CLASSES[kind]
    torch.testing.assert_close(results(fused, x), results(block, x), rtol=0, atol=0)
    assert "fused_impl" not in vars(fused)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", ["v1-padded-and-shifted", "v2-shifted", "v2-cr-shifted"])
def test_compiles_without_a_graph_break(case):
    kind, grid, options = CASES[case]
    fused = fused_copy(make(kind, grid, drop_path=0.4, **options))
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(results(lambda x: compiled(x), tokens(grid)), results(lambda x: fused(x), tokens(grid)))


class With(nn.Module):
    """A model with its loss."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.model(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "v1": lambda: SwinTransformer(img_size=32, window_size=4, **MODEL),
    "v1-padded": lambda: SwinTransformer(img_size=(28, 20), window_size=4, **MODEL),
    "v1-any-size": lambda: SwinTransformer(img_size=24, window_size=4, strict_img_size=False, **MODEL),
    "v2": lambda: SwinTransformerV2(img_size=32, window_size=4, **MODEL),
    "v2-padded": lambda: SwinTransformerV2(img_size=(28, 20), window_size=(4, 3), **MODEL),
    "v2-any-size": lambda: SwinTransformerV2(img_size=24, window_size=4, strict_img_size=False, **MODEL),
    "v2-cr": lambda: SwinTransformerV2Cr(img_size=32, window_size=4, **MODEL),
    "v2-cr-padded": lambda: SwinTransformerV2Cr(img_size=(28, 20), window_size=(4, 3), extra_norm_stage=True, **MODEL),
    "v2-cr-any-size": lambda: SwinTransformerV2Cr(img_size=24, window_size=4, strict_img_size=False, **MODEL),
}
MODEL = {
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 5,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "drop_path_rate": 0.3,
}


def image(model: Any) -> Tensor:
    size = (40, 18) if not model.patch_embed.strict_img_size else model.patch_embed.img_size
    return torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", MODELS)
def test_model_has_the_same_loss_and_gradients(name):
    torch.manual_seed(0)
    model: Any = past_the_clamp(spread(MODELS[name]())).double()
    plain = copy.deepcopy(model)
    report = fuse(model)
    layers = "stages" if "cr" in name else "layers"
    blocks = {path: what for path, what in paths(report).items() if not path.endswith("mlp")}
    additions = "add_layer_norm" if name.startswith("v1") else "layer_norm_add"
    assert blocks == {f"{layers}.{i}.blocks.{j}": f"window_attention, {additions}" for i in (0, 1) for j in (0, 1)}
    assert all(path.endswith("meta_mlp") for path in reasons(report))  # whose activation is a ReLU

    labels = torch.tensor([0, 3, 1])
    for training in (True, False):
        assert_same(
            *(With(m.train(training), lambda out: nn.functional.cross_entropy(out, labels)) for m in (model, plain)),
            image(model).double(),
        )
    for module in (model, plain):
        module.set_input_size((24, 36), window_size=(3, 2))
        module.patch_embed.strict_img_size = True
    assert_same(model, plain, image(model).double())


@pytest.mark.parametrize("name", ["v1", "v2", "v2-cr"])
def test_model_costs_no_precision_under_autocast(name):
    torch.manual_seed(0)
    model = spread(MODELS[name]())
    assert_as_accurate(fused_copy(model), model, image(model), torch.bfloat16)


@pytest.mark.parametrize("name", ["v1", "v2", "v2-cr"])
def test_checkpointed_model_has_the_same_gradients(name):
    torch.manual_seed(0)
    model: Any = spread(MODELS[name]()).double()
    model.set_grad_checkpointing()
    assert_same(fused_copy(model), model, image(model).double())

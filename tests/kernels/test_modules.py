import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from mae_kernels import modules as m
from mae_kernels import random_mask
from torch import Tensor, nn

from .calls import KERNEL_DEVICE, shuffled_rows
from .outcomes import assert_same, draw, outcome, scatter_parameters
from .tolerance import KERNEL_ERROR

IDS = shuffled_rows(2, 12)
GRID = (3, 4)  # of the patches of IMAGE
IMAGE, PATCH = (12, 12), (4, 3)
VALUES = 2 * PATCH[0] * PATCH[1]


@dataclass(frozen=True)
class Case:
    """A module and what it is called with; float64 throughout."""

    make: Callable[..., nn.Module]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    holds_parameters: bool = True

    def build(self, impl: str = "auto", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
        if self.holds_parameters:
            options["dtype"] = dtype
        module = self.make(impl=impl, **options)
        scatter_parameters(module)
        return module

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        return {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in self.inputs.items()}


def window_case(kind: str, **options: Any) -> Case:
    return Case(partial(m.WindowAttention, 8, 2, (3, 5), (2, 3), (1, 2), kind=kind, **options), {"x": draw(1, 15, 8)})


MASKED = {"image": draw(2, 2, *IMAGE), "ids_removed": IDS[:, 3:]}
CASES = {
    "RandomMasking": Case(partial(m.RandomMasking, GRID), {"seeds": torch.tensor([3, -5])}, holds_parameters=False),
    "VisiblePatchEmbed": Case(
        partial(m.VisiblePatchEmbed, IMAGE, PATCH, 8, in_channels=2, position="learned"),
        {"image": draw(2, 2, *IMAGE), "ids_keep": IDS[:, :3]},
    ),
    "RestoreTokens": Case(
        partial(m.RestoreTokens, GRID, 8, keep_cls=True),
        {"tokens": draw(2, 4, 8), "ids_restore": IDS.argsort(dim=1)},
    ),
    "WindowAttention": window_case("swin"),
    "WindowAttention V2": window_case("swin_v2"),
    "WindowAttention V2-CR": window_case("swin_v2_cr", bias_dropout=0.0),
    "MaskedMSELoss": Case(
        partial(m.MaskedMSELoss, PATCH), {"pred": draw(2, 12, VALUES), **MASKED}, holds_parameters=False
    ),
    "LinearMaskedMSELoss": Case(partial(m.LinearMaskedMSELoss, 8, PATCH, 2), {"hidden": draw(2, 12, 8), **MASKED}),
    "AddLayerNorm": Case(
        partial(m.AddLayerNorm, 8, 1e-6),
        {"x": draw(2, 5, 8), "residual": draw(2, 5, 8, seed=1), "branch_scale": draw(2)},
    ),
    "FusedMlp": Case(partial(m.FusedMlp, 8, 16), {"x": draw(2, 5, 8)}),
    "FlashSelfAttention": Case(partial(m.FlashSelfAttention, 8, 2), {"x": draw(2, 5, 8)}),
}
WITH_PARAMETERS = [name for name, case in CASES.items() if case.holds_parameters]


def test_every_module_is_tried_here():
    assert {name.partition(" ")[0] for name in CASES} == set(m.__all__) - {"PatchMask"}


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    case = CASES[name]
    reference, torch_form = case.build("reference"), case.build("torch")
    torch_form.load_state_dict(reference.state_dict())
    assert_same(outcome(torch_form, case.inputs), outcome(reference, case.inputs))


@pytest.mark.parametrize("name", [name for name in CASES if name != "WindowAttention V2"])  # as V2-CR to its kernel
def test_kernels_agree(name):
    case = CASES[name]
    reference, kernel = (case.build(impl, torch.float32).to(KERNEL_DEVICE) for impl in ("reference", "triton"))
    kernel.load_state_dict(reference.state_dict())
    inputs = case.cast(torch.float32, KERNEL_DEVICE)
    assert_same(outcome(kernel, inputs), outcome(reference, inputs), 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_an_unknown_impl_is_refused(name):
    with pytest.raises(ValueError, match=r"^impl is 'cuda', expected one of 'reference', 'torch', 'triton', 'auto'$"):
        CASES[name].make(impl="cuda")


@pytest.mark.parametrize("name", CASES)
def test_settings_are_shown(name):
    assert "impl='torch'" in repr(CASES[name].make(impl="torch"))


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    case = CASES[name]
    # One fused form of window attention, which takes seconds to trace, is enough.
    impl = "reference" if name in ("WindowAttention", "WindowAttention V2") else "auto"
    module, inputs = case.build(impl, torch.float32), case.cast(torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(outcome(module, inputs, compiled), outcome(module, inputs), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_autocast(name):
    case = CASES[name]
    module, published = (case.build(impl, torch.float32) for impl in ("torch", "reference"))
    published.load_state_dict(module.state_dict())
    inputs = case.cast(torch.float32)
    exact = {what: tensor.double() if tensor.is_floating_point() else tensor for what, tensor in inputs.items()}
    truth = outcome(copy.deepcopy(published).double(), exact)
    with torch.autocast("cpu", torch.bfloat16):
        results, plain = outcome(module, inputs), outcome(published, inputs)
    for what, value in truth.items():
        assert results[what].dtype == plain[what].dtype, what
        value = value.double()
        error, allowed = ((x[what].double() - value).abs().max().item() for x in (results, plain))
        bound = 2 * allowed + KERNEL_ERROR[torch.bfloat16] * max(value.abs().max().item(), 1e-2)  # some are 0
        assert error <= bound, f"{what} is off by {error:.2e}, the published form by {allowed:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_copies_compute_the_same(name):
    case = CASES[name]
    module = case.build()
    expected = outcome(module, case.inputs)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    other = case.build()
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False), other):
        assert twin.state_dict().keys() == module.state_dict().keys()
        assert_same(outcome(twin, case.inputs), expected, 0)


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_a_module_from_the_meta_device_starts_as_any_other(name):
    make = partial(CASES[name].make, dtype=torch.float64)
    shapes = make(device="meta")
    assert all(tensor.is_meta for tensor in (*shapes.parameters(), *shapes.buffers()))
    module = shapes.to_empty(device="cpu")
    torch.manual_seed(0)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    fresh = make()
    assert dict(module.named_buffers()).keys() == dict(fresh.named_buffers()).keys()
    torch.testing.assert_close(dict(module.named_buffers()), dict(fresh.named_buffers()), rtol=0, atol=0)
    for path, parameter in module.named_parameters():
        assert parameter.isfinite().all(), path
        assert (parameter.std(correction=0) == 0) == (fresh.get_parameter(path).std(correction=0) == 0), path
    assert outcome(module, CASES[name].inputs)["output 0"].isfinite().all()


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_dtype_and_device_are_those_asked_for(name):
    module = CASES[name].make(dtype=torch.bfloat16, device="meta")
    floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    assert {(t.dtype, t.device.type) for t in floating} == {(torch.bfloat16, "meta")}


def test_random_masking_keeps_as_many_as_published():
    for grid, ratio, kept in [(196, 0.75, 49), ((64, 8), 0.8, 102), (10, 0.0, 10), ((5, 2), 0.3, 7)]:
        masking = m.RandomMasking(grid, ratio)
        mask = masking(torch.arange(3))
        assert masking.keep == kept == mask.ids_keep.shape[1]
        assert mask.mask.dtype == torch.bool
        assert (mask.mask.sum(dim=1) == masking.length - kept).all()
        assert mask.mask.gather(1, mask.ids_removed).all()
        assert not mask.mask.gather(1, mask.ids_keep).any()
        order = torch.cat([mask.ids_keep, mask.ids_removed], dim=1)
        assert torch.equal(order.gather(1, mask.ids_restore), torch.arange(masking.length).expand(3, -1))


def test_random_masking_depends_on_seeds_alone():
    masking = m.RandomMasking(GRID, 0.5)
    seeds = torch.tensor([7, 2**40, -1])
    mask = masking(seeds)
    for tensor, expected in zip(mask, random_mask(seeds, 12, 6), strict=True):
        assert torch.equal(tensor, expected)
    for tensor, expected in zip(masking.eval()(seeds.flip(0)), mask, strict=True):
        assert torch.equal(tensor.flip(0), expected)


def test_random_masking_draws_seeds_from_pytorchs_generator():
    masking = m.RandomMasking(40)
    torch.manual_seed(0)
    first, second = masking(batch_size=3), masking(batch_size=3)
    torch.manual_seed(0)
    assert torch.equal(masking(batch_size=3).ids_restore, first.ids_restore)
    rows = torch.cat([first.ids_restore, second.ids_restore])
    assert len(rows.unique(dim=0)) == 6
    own = [masking(batch_size=3, generator=torch.Generator().manual_seed(5)).ids_restore for _ in range(2)]
    assert torch.equal(*own)
    assert masking(batch_size=2, device="meta").mask.is_meta
    compiled = torch.compile(masking, fullgraph=True, backend="aot_eager")
    assert compiled(batch_size=3).ids_keep.shape == (3, 10)


ERRORS = [
    (lambda: m.RandomMasking(0), "RandomMasking: grid is 0, expected an int of at least 1"),
    (lambda: m.RandomMasking((4, 0)), "RandomMasking: grid is (4, 0), expected one or two ints of at least 1"),
    (lambda: m.RandomMasking(9, 1.0), "RandomMasking: ratio is 1.0, expected a number from 0 to below 1"),
    (lambda: m.RandomMasking(9, 0.9), "RandomMasking: a ratio of 0.9 keeps 0 of 9 patches, expected some"),
    (lambda: m.RandomMasking(9)(), "RandomMasking: neither of seeds and batch_size given, expected one"),
    (
        lambda: m.RandomMasking(9)(torch.arange(2), batch_size=2),
        "RandomMasking: both of seeds and batch_size given, expected one",
    ),
    (
        lambda: m.RandomMasking(9)(torch.arange(2), device="cpu"),
        "RandomMasking: a generator or device given with seeds, expected them with batch_size",
    ),
    (
        lambda: m.VisiblePatchEmbed(15, 16, 8),
        "VisiblePatchEmbed: patch_size is (16, 16), expected at most the image_size (15, 15)",
    ),
    (
        lambda: m.VisiblePatchEmbed((64, 60), 16, 8),
        "VisiblePatchEmbed: image_size is (64, 60), expected multiples of patch_size (16, 16)",
    ),
    (
        lambda: m.VisiblePatchEmbed(64, 16, 8, stride=(8, 17)),
        "VisiblePatchEmbed: stride is (8, 17), expected at most the patch_size (16, 16)",
    ),
    (lambda: m.VisiblePatchEmbed(64, 16, 0), "VisiblePatchEmbed: dim is 0, expected an int of at least 1"),
    (
        lambda: m.VisiblePatchEmbed(64, 16, 6),
        "VisiblePatchEmbed: dim is 6 with position 'sincos', expected a multiple of 4",
    ),
    (
        lambda: m.VisiblePatchEmbed(64, 16, 8, position="rope"),
        "VisiblePatchEmbed: position is 'rope', expected 'learned', 'sincos' or None",
    ),
    (
        lambda: m.VisiblePatchEmbed(64, 16, 8)(torch.zeros(2, 3, 64, 32)),
        "VisiblePatchEmbed: image has shape (2, 3, 64, 32), expected (B, 3, 64, 64)",
    ),
    (
        lambda: m.RestoreTokens(12, 8),
        "RestoreTokens: grid is a number with position 'sincos', expected rows and columns",
    ),
    (
        lambda: m.RestoreTokens(GRID, 8, has_cls=False, keep_cls=True),
        "RestoreTokens: keep_cls is True with has_cls False, expected tokens with a class token",
    ),
    (
        lambda: m.RestoreTokens(GRID, 8)(torch.zeros(2, 4, 8), torch.zeros(2, 11, dtype=torch.int64)),
        "RestoreTokens: ids_restore has shape (2, 11), expected (B, 12)",
    ),
    (
        lambda: m.WindowAttention(8, 2, (4, 4), 2, kind="swin_v3"),
        "WindowAttention: kind is 'swin_v3', expected one of 'swin', 'swin_v2', 'swin_v2_cr'",
    ),
    (lambda: m.WindowAttention(8, 3, (4, 4), 2), "WindowAttention: 3 heads do not divide a width of 8"),
    (
        lambda: m.WindowAttention(8, 2, (4, 4), 2, 4),
        "WindowAttention: shift is (4, 4), expected less than the padded grid (4, 4)",
    ),
    (
        lambda: m.WindowAttention(8, 2, (4, 4), 2, pretrained_window=4),
        "WindowAttention: pretrained_window is 4 with kind 'swin', expected None but for 'swin_v2'",
    ),
    (
        lambda: m.WindowAttention(8, 2, (4, 4), 2, kind="swin_v2", bias_dropout=0.1),
        "WindowAttention: bias_dropout is 0.1 with kind 'swin_v2', expected None but for 'swin_v2_cr'",
    ),
    (
        lambda: m.WindowAttention(8, 2, (4, 4), 2, kind="swin_v2_cr", bias_dropout=1.0),
        "WindowAttention: bias_dropout is 1.0, expected a number from 0 to below 1",
    ),
    (
        lambda: m.WindowAttention(8, 2, (4, 4), 2)(torch.zeros(2, 15, 8)),
        "WindowAttention: x has shape (2, 15, 8), expected (B, 16, 8)",
    ),
    (lambda: m.MaskedMSELoss(0), "MaskedMSELoss: patch_size is 0, expected one or two ints of at least 1"),
    (
        lambda: m.MaskedMSELoss(4)(torch.zeros(2, 9, 48), torch.zeros(2, 3, 12, 12)),
        "MaskedMSELoss: neither of ids_removed and mask given, expected one",
    ),
    (
        lambda: m.MaskedMSELoss(PATCH)(*CASES["MaskedMSELoss"].inputs.values(), torch.ones(2, 12)),
        "MaskedMSELoss: both of ids_removed and mask given, expected one",
    ),
    (
        lambda: m.MaskedMSELoss(4)(torch.zeros(2, 9, 48), torch.zeros(2, 3, 12, 12), mask=torch.ones(2, 8)),
        "MaskedMSELoss: mask has shape (2, 8), expected (2, 9) for an image of (2, 3, 12, 12)",
    ),
    (
        lambda: m.MaskedMSELoss(4)(torch.zeros(2, 9, 47), torch.zeros(2, 3, 12, 12), mask=torch.ones(2, 9)),
        "MaskedMSELoss: pred has shape (2, 9, 47), expected (2, 9, 48) for an image of (2, 3, 12, 12)",
    ),
    (lambda: m.LinearMaskedMSELoss(8, 4, 0), "LinearMaskedMSELoss: in_channels is 0, expected an int of at least 1"),
    (lambda: m.AddLayerNorm(0, 1e-6), "AddLayerNorm: dim is 0, expected an int of at least 1"),
    (lambda: m.FusedMlp(8, 0), "FusedMlp: hidden_dim is 0, expected an int of at least 1"),
    (lambda: m.FlashSelfAttention(8, 3), "FlashSelfAttention: 3 heads do not divide a width of 8"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()

"""``fuse`` and ``unfuse`` themselves; each target has tests of its own."""

import warnings

import mae_kernels
import pytest
import timm
import torch
from mae_kernels import patching
from torch import nn


def model() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def test_what_was_replaced_is_told_by_path_and_can_be_undone():
    vit = model()
    before = {path: type(module) for path, module in vit.named_modules()}
    report = mae_kernels.fuse(vit, impl="torch")
    assert [change.path for change in report.replaced][:3] == ["blocks.0", "blocks.0.attn", "blocks.0.mlp"]
    assert str(report).splitlines()[:2] == [
        "6 replaced, 0 left as they are",
        "replaced blocks.0: Block: add_layer_norm",
    ]
    assert "FusedBlock(" in repr(vit)
    assert {change.path for change in mae_kernels.unfuse(vit).replaced} == {change.path for change in report.replaced}
    assert {path: type(module) for path, module in vit.named_modules()} == before
    assert "Fused" not in repr(vit)


def test_what_is_fused_already_is_left():
    vit = model()
    mae_kernels.fuse(vit, impl="torch")
    again = mae_kernels.fuse(vit, impl="torch")
    assert (len(again.replaced), {change.what for change in again.left}) == (0, {"is fused already"})


def test_other_models_and_other_instances_are_not_touched():
    other, plain = nn.Sequential(nn.Linear(2, 2), nn.GELU()), model()
    assert mae_kernels.fuse(other, impl="torch") == patching.Report()
    mae_kernels.fuse(model(), impl="torch")
    assert not any(isinstance(module, patching.Fused) for module in plain.modules())
    assert mae_kernels.unfuse(plain) == patching.Report()


def test_an_unknown_form():
    with pytest.raises(ValueError, match="impl is 'cuda', expected one of"):
        mae_kernels.fuse(model(), impl="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_one_warning_without_a_gpu():
    patching._warn_of_torch_forms.cache_clear()
    with pytest.warns(UserWarning, match="fuse: no GPU is here, so operators take their PyTorch forms") as caught:
        mae_kernels.fuse(model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mae_kernels.fuse(model())
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_no_warning_where_a_form_is_asked_for():
    patching._warn_of_torch_forms.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mae_kernels.fuse(model(), impl="torch")

"""Other libraries' models before and after they are fused, at a small size on a CPU."""

import pytest
import timm
import torch
from torch import nn

from bench import drop_in_suite
from bench.compare import Plan
from bench.drop_in_suite import measure_drop_in
from bench.mae_models import MaskedAutoencoderViT

CPU = torch.device("cpu")
SHORT = Plan(short=True)


def small_mae() -> nn.Module:
    return MaskedAutoencoderViT(
        32, 8, embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
    )


def small_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "a masked autoencoder": ("timm", small_mae, (3, 32, 32)),
        "a classifier": ("timm", small_vit, (3, 32, 32)),
        "unknown": ("a_library_that_nobody_has", small_vit, (3, 32, 32)),
    }
    monkeypatch.setattr(drop_in_suite, "MODELS", cases)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(("task", "replaced"), [("a masked autoencoder", 7), ("a classifier", 6)])
def test_before_and_after(task: str, replaced: int) -> None:
    original, fused = measure_drop_in(SHORT, task, CPU, 2, torch.float32, budget_s=0.1)
    assert (original.provider, fused.provider) == ("original", "fused")
    assert fused.facts["modules replaced"] == replaced
    assert "modules replaced" not in original.facts
    assert fused.saved_mib < original.saved_mib
    assert 0 < fused.error < 1e-5
    assert original.ratio == 1


@pytest.mark.usefixtures("models")
def test_a_library_that_is_absent() -> None:
    (row,) = measure_drop_in(SHORT, "unknown", CPU, 2, torch.float32)
    assert row.absent == "a_library_that_nobody_has is not installed"


@pytest.mark.usefixtures("models")
def test_a_fused_model_that_computes_something_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse = drop_in_suite.mae_kernels.fuse

    def and_spoil(model: nn.Module) -> object:
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
        return fuse(model)

    monkeypatch.setattr(drop_in_suite.mae_kernels, "fuse", and_spoil)
    wrong, original = measure_drop_in(SHORT, "a classifier", CPU, 2, torch.float32, budget_s=0.1)
    assert wrong.provider == "fused"
    assert "is off by" in wrong.wrong
    assert wrong.p50_ms is None
    assert original.provider == "original"

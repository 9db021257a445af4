"""Models as timm's VisionTransformer: the same outputs, and files that load back to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from audiomae import AudioClassifier, AudioMAE, checkpoints
from audiomae.checkpoints import load_classifier, load_encoder, start_classifier, start_encoder, to_timm

from .official import assert_same, error_line
from .small_models import classifier, pretrained

INPUTS: list[dict[str, Any]] = [
    {"spec_size": (64, 128)},
    {"spec_size": (48, 128), "patch_size": (16, 32), "patch_stride": (16, 32), "position_grid": "official"},
    {"spec_size": (14, 6), "patch_size": (2, 3), "patch_stride": (2, 3), "in_channels": 2, "mlp_ratio": 1.5},
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def save(path: Path, model: nn.Module, layout: str) -> Path:
    if layout == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("settings", INPUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("impl", ["reference", "auto"])
@torch.no_grad()
def test_computes_the_same(settings: dict[str, Any], dtype: torch.dtype, tolerance: float, impl: str):
    model, fine_tuned = pretrained(impl, **settings).to(dtype), classifier(impl, **settings).to(dtype)
    spec = torch.randn(3, model.config.in_channels, *model.config.spec_size, dtype=dtype)
    tokens, logits = model.encoder(spec), fine_tuned(spec)
    torch.testing.assert_close(to_timm(model)(spec), tokens, rtol=0, atol=tolerance)
    torch.testing.assert_close(to_timm(fine_tuned)(spec), logits, rtol=0, atol=tolerance)
    assert tokens.std() > 0.5
    assert logits.std() > 0.1


@pytest.mark.parametrize("layout", ["safetensors", "torch.save"])
@pytest.mark.parametrize("settings", INPUTS[:2])
def test_pretrained_loads_back(tmp_path: Path, layout: str, settings: dict[str, Any]):
    model = pretrained(**settings)
    path = save(tmp_path / "vit", to_timm(model), layout)
    config, encoder = load_encoder(path)
    assert_same(encoder.state_dict(), model.encoder.state_dict())
    known = {"spec_size", "patch_size", "patch_stride", "in_channels", "embed_dim", "depth", "num_heads", "mlp_ratio"}
    assert {name: getattr(config, name) for name in known} == {name: getattr(model.config, name) for name in known}
    other = pretrained(**settings)
    assert start_encoder(other.encoder, path) == []
    assert_same(other.encoder.state_dict(), model.encoder.state_dict())


@pytest.mark.parametrize("layout", ["safetensors", "torch.save"])
def test_classifier_loads_back(tmp_path: Path, layout: str):
    model = classifier()
    path = save(tmp_path / "vit", to_timm(model), layout)
    back = load_classifier(path)
    assert_same(back.state_dict(), model.state_dict())
    assert back.config.num_classes == 5
    assert_same(load_encoder(path)[1].state_dict(), model.encoder.state_dict())
    other = classifier()
    assert start_classifier(other, path) == ["head of 5 classes taken from the file"]
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("make", [pretrained, classifier])
def test_tensors_are_copies_of_the_same_kind(make: Callable[..., AudioMAE | AudioClassifier]):
    model = make().to(torch.bfloat16)
    model.head = nn.Linear(192, 5, dtype=torch.float64) if isinstance(model, AudioClassifier) else nn.Identity()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    timm_model = to_timm(model)
    for name, parameter in timm_model.named_parameters():
        assert parameter.dtype == (torch.float64 if name.startswith("head") else torch.bfloat16)
        assert parameter.requires_grad
        nn.init.zeros_(parameter)
    assert_same(model.state_dict(), before)
    assert {tensor.device.type for tensor in to_timm(model.to("meta")).state_dict().values()} == {"meta"}


def test_training_goes_on_in_the_same_way():
    model = classifier(drop_path=0.3).train()
    state = torch.get_rng_state()
    timm_model = to_timm(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert timm_model.training
    assert timm_model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert not to_timm(model.eval()).training


def test_dictionaries_are_renamed():
    model = pretrained()
    renamed = to_timm(model.state_dict())
    assert_same(renamed, to_timm(model).state_dict())
    assert_same(checkpoints.from_timm(renamed), {f"encoder.{k}": v for k, v in model.encoder.state_dict().items()})


def test_overlap_is_refused():
    model = classifier(patch_stride=(10, 16))
    error_line(lambda: to_timm(model), "patch_stride is (10, 16), expected patch_size (16, 16)", kind=ValueError)


def test_other_modules_are_refused():
    error_line(lambda: to_timm(pretrained().encoder), "weights are Encoder, expected AudioMAE,", kind=TypeError)

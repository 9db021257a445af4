"""The classifier: tokens it sees, pooling, stochastic depth, and agreement with an independent transcription."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audiomae import AudioClassifier, AudioClassifierConfig, PatchGrid, PatchMask
from audiomae.checkpoints import load_classifier
from audiomae.encoder import drop_path_scales
from tests.audiomae.classifier_transcription import classifier_logits, official_classifier_state

IMPLS = ["reference", "auto"]
SIZES: dict[str, Any] = {"spec_size": (64, 128), "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def classifier(impl: str = "auto", **settings: Any) -> AudioClassifier:
    torch.manual_seed(0)
    model = AudioClassifier(AudioClassifierConfig(**{**SIZES, **settings}), impl)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frames", [96, 256])
def test_official_weights_give_the_logits_of_the_transcription(
    tmp_path: Path, impl: str, masked: bool, frames: int
) -> None:
    grid = PatchGrid((frames, 128))
    state = official_classifier_state(3, depth=2, dim=192, heads=3, mlp_ratio=4, grid=grid.shape, classes=11)
    path = tmp_path / "finetuned.pth"
    torch.save({"model": state, "args": argparse.Namespace(nb_classes=11, mask_2d=True), "epoch": 59}, path)
    model = load_classifier(path, impl).double().eval()
    assert (model.config.spec_size, model.config.num_classes, model.config.labels) == ((frames, 128), 11, ())
    spec = torch.randn(3, 1, frames, 128, dtype=torch.float64)
    mask = PatchMask.time_frequency(torch.arange(3), grid, 0.3, 0.3) if masked else None
    expected = classifier_logits(state, spec, 3, None if mask is None else mask.ids_keep)
    torch.testing.assert_close(model(spec, mask), expected, rtol=1e-8, atol=1e-8)


def test_masking_of_the_paper_keeps_44_times_5_tokens() -> None:
    model = AudioClassifier(AudioClassifierConfig(embed_dim=16, depth=1, num_heads=1, num_classes=2))
    mask = PatchMask.time_frequency(torch.arange(2), model.grid, 0.3, 0.3)
    seen: list[Tensor] = []
    model.encoder.blocks[0].attn.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.randn(2, 1, 1024, 128), mask)
    assert seen[0].shape == (2, 44 * 5 + 1, 16)


@pytest.mark.parametrize("impl", IMPLS)
def test_pooling_leaves_the_class_token_out(impl: str) -> None:
    model = classifier(impl).eval()
    spec = torch.randn(2, 1, 64, 128)
    tokens = model.encoder(spec)
    pooled = torch.nn.functional.layer_norm(
        tokens[:, 1:].mean(1), (24,), model.fc_norm.weight, model.fc_norm.bias, eps=1e-6
    )
    torch.testing.assert_close(model.pool(spec), pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(spec), model.head(pooled), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens, model.encoder.hidden_states(spec)[-1], rtol=0, atol=0)


def test_a_new_head_scores_almost_nothing() -> None:
    torch.manual_seed(0)
    model = AudioClassifier(AudioClassifierConfig(**SIZES)).eval()
    logits = model(torch.randn(4, 1, 64, 128))
    assert 0 < logits.abs().max() < 1e-2
    assert (model.head.bias == 0).all()


def test_drop_path_rises_with_depth_and_keeps_the_mean() -> None:
    scales = drop_path_scales(torch.arange(20_000), 0.3, 4)
    assert scales.shape == (4, 2, 20_000)
    for block, rate in zip(scales, (0.0, 0.1, 0.2, 0.3), strict=True):
        assert block.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)] if rate else [1.0])
        torch.testing.assert_close((block == 0).float().mean(1), torch.full((2,), rate), rtol=0, atol=0.01)
        torch.testing.assert_close(block.mean(1), torch.ones(2), rtol=0, atol=0.02)


def test_drop_path_is_a_samples_own() -> None:
    seeds = torch.tensor([5, -(2**62), 7])
    together = drop_path_scales(seeds, 0.5, 6)
    alone = torch.cat([drop_path_scales(seed[None], 0.5, 6) for seed in seeds], dim=2)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_drop_path_acts_in_training_alone(impl: str) -> None:
    model = classifier(impl, drop_path=0.6)
    spec, seeds = torch.randn(8, 1, 64, 128), torch.arange(8)
    torch.testing.assert_close(model(spec, seeds=seeds), model(spec, seeds=seeds), rtol=0, atol=0)
    assert not torch.equal(model(spec, seeds=seeds), model(spec, seeds=seeds + 8))
    assert not torch.equal(model(spec), model(spec))
    model.eval()
    torch.testing.assert_close(model(spec, seeds=seeds), model(spec, seeds=seeds + 8), rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_drop_path_scales_the_branches_by_hand(impl: str) -> None:
    model = classifier(impl, drop_path=0.5, depth=3).double()
    spec, seeds = torch.randn(4, 1, 64, 128, dtype=torch.float64), torch.arange(4)
    x = model.encoder._embed(spec, None)
    scales: Any = drop_path_scales(seeds, 0.5, 3).double()[..., None, None]
    for block, (attention, mlp) in zip(model.encoder.blocks, scales, strict=True):
        x = x + attention * block.attn(block.norm1(x))
        x = x + mlp * block.mlp(block.norm2(x))
    torch.testing.assert_close(model.pool(spec, seeds=seeds), model.fc_norm(x[:, 1:].mean(1)), rtol=1e-9, atol=1e-9)


def test_scores_are_probabilities() -> None:
    logits = torch.randn(3, 5, dtype=torch.bfloat16)
    sigmoid, softmax = (classifier(activation=name).scores(logits) for name in ("sigmoid", "softmax"))
    assert sigmoid.dtype == softmax.dtype == torch.float32
    torch.testing.assert_close(softmax.sum(1), torch.ones(3))
    torch.testing.assert_close(sigmoid, 1 / (1 + (-logits.float()).exp()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0, expected more than 0"),
        ({"labels": ("a", "b")}, "2 labels for 5 classes, expected one for each or none"),
        ({"drop_path": 1.0}, "drop_path is 1.0, expected 0 up to but not 1"),
        ({"activation": "tanh"}, "activation is 'tanh', expected 'sigmoid' or 'softmax'"),
        ({"std": 0.0}, "std is 0.0, expected more than 0"),
        ({"num_heads": 5}, "5 heads do not divide a width of 24"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(**settings)

"""Checkpoints of classifiers: there and back, starting a head, and what does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from audiomae import AudioClassifier, AudioClassifierConfig, AudioMAE, AudioMAEConfig
from audiomae.checkpoints import (
    CheckpointError,
    load,
    load_classifier,
    load_encoder,
    load_model,
    save_official,
    save_weights,
    start_classifier,
    start_encoder,
)

ENCODER: dict[str, Any] = {"spec_size": (64, 128), "embed_dim": 192, "depth": 1, "num_heads": 3}
CONFIG = AudioClassifierConfig(**ENCODER, num_classes=3, labels=("a", "b", "c"), multi_label=False, mean=-6.6, std=5.3)


def randomized(config: AudioClassifierConfig = CONFIG) -> AudioClassifier:
    model = AudioClassifier(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def pretrained() -> AudioMAE:
    return AudioMAE(AudioMAEConfig(**ENCODER, decoder_dim=16, decoder_depth=1, decoder_heads=2))


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("save", [save_weights, save_official])
def test_there_and_back(tmp_path: Path, save: Any) -> None:
    model, path = randomized(), tmp_path / "weights"
    save(path, model)
    back = load_classifier(path)
    assert back.config == model.config
    assert_same_state(back, model)


def test_the_official_file_has_official_names(tmp_path: Path) -> None:
    save_official(tmp_path / "finetuned.pth", randomized())
    names = torch.load(tmp_path / "finetuned.pth", weights_only=True)["model"].keys()
    first_parts = {name.partition(".")[0] for name in names}
    assert first_parts == {"cls_token", "pos_embed", "patch_embed", "blocks", "fc_norm", "head"}


def test_a_classifiers_encoder_is_an_encoder(tmp_path: Path) -> None:
    model, path = randomized(), tmp_path / "weights.safetensors"
    save_weights(path, model)
    config, state = load(path)
    assert config.encoder_settings() == CONFIG.encoder_settings()
    assert {name.partition(".")[0] for name in state} == {"encoder"}
    config, encoder = load_encoder(path)
    assert encoder.norm is None
    assert_same_state(encoder, model.encoder)
    with pytest.raises(CheckpointError, match="holds an encoder without a decoder"):
        load_model(path)


def test_a_pretrained_encoder_keeps_its_norm(tmp_path: Path) -> None:
    model, path = pretrained(), tmp_path / "weights.safetensors"
    save_weights(path, model)
    config, encoder = load_encoder(path)
    assert config.encoder_settings() == model.config.encoder_settings()
    assert_same_state(encoder, model.encoder)
    with pytest.raises(CheckpointError, match=r"has no fc_norm.weight, expected a classifier"):
        load_classifier(path)


def test_starting_from_a_pretrained_model_keeps_the_head(tmp_path: Path) -> None:
    source, model = pretrained(), randomized()
    save_weights(tmp_path / "weights", source)
    head = model.head.weight.clone()
    notes = start_classifier(model, tmp_path / "weights")
    assert [note.partition(":")[0] for note in notes] == ["decoder left out", "final norm left out"]
    torch.testing.assert_close(model.head.weight, head, rtol=0, atol=0)
    for name, tensor in model.encoder.state_dict().items():
        torch.testing.assert_close(tensor, source.encoder.state_dict()[name], rtol=0, atol=0)


def test_starting_from_a_classifier_takes_its_head(tmp_path: Path) -> None:
    source, model = randomized(), randomized()
    save_weights(tmp_path / "weights", source)
    assert start_classifier(model, tmp_path / "weights") == ["head of 3 classes taken from the file"]
    assert_same_state(model, source)


def test_a_new_head_has_to_be_asked_for(tmp_path: Path) -> None:
    save_weights(tmp_path / "weights", randomized())
    other = randomized(replace(CONFIG, num_classes=4, labels=()))
    head = other.head.weight.clone()
    with pytest.raises(CheckpointError, match=r"classifies 3 classes, expected 4: --reset-head starts with a new head"):
        start_classifier(other, tmp_path / "weights")
    notes = start_classifier(other, tmp_path / "weights", reset_head=True)
    assert notes == ["the file's classifier left out: the head starts anew"]
    torch.testing.assert_close(other.head.weight, head, rtol=0, atol=0)


def test_classes_of_the_same_number_but_other_names_do_not_fit(tmp_path: Path) -> None:
    save_weights(tmp_path / "weights", randomized())
    other = randomized(replace(CONFIG, labels=("a", "x", "c")))
    with pytest.raises(CheckpointError, match=r"has 'b' as class 1, expected 'x': --reset-head"):
        start_classifier(other, tmp_path / "weights")
    notes = start_classifier(randomized(replace(CONFIG, labels=())), tmp_path / "weights")
    assert notes == ["head of 3 classes taken from the file"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": 384, "num_heads": 6}, "does not fit the encoder: width is 192, expected 384; heads is 3"),
        ({"depth": 2}, "does not fit the encoder: depth is 1, expected 2"),
        ({"patch_size": (16, 32), "patch_stride": (16, 32)}, r"patch size is \(16, 16\), expected \(16, 32\)"),
    ],
)
def test_another_encoder_does_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_weights(tmp_path / "weights", pretrained())
    with pytest.raises(CheckpointError, match=message):
        start_classifier(AudioClassifier(replace(CONFIG, **settings)), tmp_path / "weights")


def test_a_shorter_input_takes_the_leading_positions(tmp_path: Path) -> None:
    source = pretrained()
    save_weights(tmp_path / "weights", source)
    model = AudioClassifier(replace(CONFIG, spec_size=(32, 128)))
    notes = start_classifier(model, tmp_path / "weights")
    assert "position embedding cropped to the first 2 of 4 time steps" in notes
    torch.testing.assert_close(model.encoder.pos_embed, source.encoder.pos_embed[:, :17], rtol=0, atol=0)


def test_files_with_a_part_of_a_head_are_refused(tmp_path: Path) -> None:
    model = randomized()
    state = {name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items()}
    del state["fc_norm.bias"]
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"has no fc_norm.bias, expected a classifier on the mean"):
        load_classifier(tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"has no fc_norm.bias.*; --reset-head starts with a new head"):
        start_classifier(randomized(), tmp_path / "part.pth")
    assert start_encoder(model.encoder, tmp_path / "part.pth") == ["classifier left out: fc_norm, head"]


def test_a_native_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = randomized()
    state = {**model.state_dict(), "head.bias": torch.zeros(7)}
    torch.save({"model": state, "config": CONFIG.to_dict()}, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=r"head.bias has shape \(7,\), expected \(3,\)"):
        load_classifier(tmp_path / "wrong.pt")

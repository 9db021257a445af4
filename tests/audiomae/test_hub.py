"""Folders and repositories of the Hugging Face Hub: there and back, strictly, and for every function that loads."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from audiomae import AudioClassifier, AudioMAE
from audiomae.checkpoints import (
    load,
    load_classifier,
    load_encoder,
    load_model,
    save_weights,
    start_classifier,
    start_encoder,
    to_timm,
)

from .official import assert_same, error_line, small_config
from .small_models import classifier, pretrained

LABELS = ("dog", "cat, purring", "3", "rain", "ö")
MODELS: list[tuple[Any, dict[str, Any]]] = [
    (pretrained, {"window": (2, 4), "shift": (1, 2), "mean": -6.5, "norm_target": False, "decoder": "global"}),
    (pretrained, {"patch_stride": (10, 12), "embed_dim": 36, "num_heads": 2, "decoder_depth": None}),
    (classifier, {"labels": LABELS, "multi_label": False, "activation": "softmax", "std": 2.5, "sample_rate": 8000}),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise AssertionError(f"asked the Hub for {args} {kwargs}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", refuse)


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Let the Hub have one repository, and return the list of what is asked of it."""
    asked = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options))
        if not (folder / filename).exists():
            raise EntryNotFoundError("404 Client Error.\n\nEntry not found")
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


@pytest.mark.parametrize(("make", "settings"), MODELS)
def test_there_and_back(tmp_path: Path, make: Any, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    model = make(**settings)
    assert model.save_pretrained(tmp_path / "a" / "model") is None
    back = type(model).from_pretrained(tmp_path / "a" / "model", impl="reference")
    assert type(back) is type(model)
    assert back.config == model.config
    assert all(type(value) is type(getattr(model.config, key)) for key, value in vars(back.config).items())
    assert_same(back.state_dict(), model.state_dict())
    assert back.impl == back.encoder.impl == "reference"
    assert not back.training
    assert capsys.readouterr().out == ""
    back.save_pretrained(str(tmp_path / "again"))
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "a" / "model" / name).read_bytes()


def test_a_model_of_the_default_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = small_config(embed_dim=64, num_heads=1, depth=1)
    monkeypatch.setattr("audiomae.model.AudioMAEConfig", lambda: config)
    AudioMAE(impl="reference").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))
    assert AudioMAE.from_pretrained(tmp_path).config == config


def test_another_configuration_can_be_given(tmp_path: Path):
    model = pretrained()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    other = small_config(decoder_dim=16, decoder_depth=1, decoder_heads=2, norm_target=False, embed_dim=192)
    assert AudioMAE.from_pretrained(tmp_path, config=other).config == other
    assert AudioMAE.from_pretrained(tmp_path, map_location="meta", config=other).encoder.pos_embed.is_meta


def test_subclasses_of_a_model(tmp_path: Path):
    class Listener(AudioMAE):
        pass

    Listener(pretrained().config).save_pretrained(tmp_path)
    assert type(Listener.from_pretrained(tmp_path)) is Listener
    assert "Listener.from_pretrained" in (tmp_path / "README.md").read_text()


def test_the_other_class_is_refused(tmp_path: Path):
    pretrained().save_pretrained(tmp_path / "mae")
    classifier().save_pretrained(tmp_path / "classifier")
    error_line(
        lambda: AudioMAE.from_pretrained(tmp_path / "classifier"),
        f"{tmp_path / 'classifier'}: holds an AudioClassifier, expected an AudioMAE: AudioClassifier.from_pretrained",
    )
    error_line(
        lambda: AudioClassifier.from_pretrained(tmp_path / "mae"), "holds an AudioMAE, expected an AudioClassifier"
    )


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda state: state.pop("head.bias"), ["1 missing tensors: head.bias"]),
        (lambda state: state.update(extra=torch.zeros(1)), ["1 unknown tensors: extra"]),
        (lambda state: state.update({"head.bias": torch.zeros(7)}), ["head.bias has shape (7,), expected (5,)"]),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Any, facts: list[str]):
    classifier().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    error_line(lambda: AudioClassifier.from_pretrained(tmp_path), str(tmp_path), *facts)


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"colour": "red"}, ["unknown settings: colour"]),
        ({"depth": "two"}, ["depth is 'two', expected int"]),
        ({"depth": 3}, ["missing tensors: encoder.blocks.2.norm1.weight"]),
        ({"num_heads": 5}, ["5 heads do not divide a width of 192"]),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, config: dict[str, Any], facts: list[str]):
    model = classifier()
    model.save_pretrained(tmp_path, config={**model.config.to_dict(), **config})
    error_line(lambda: AudioClassifier.from_pretrained(tmp_path), str(tmp_path), *facts)
    error_line(lambda: load_classifier(tmp_path), str(tmp_path), *facts)


def test_no_configuration(tmp_path: Path):
    classifier().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    error_line(lambda: AudioClassifier.from_pretrained(tmp_path), f"{path} is no JSON")
    for foreign in ('{"architectures": ["ViTModel"], "hidden_size": 192}', "[1]"):
        path.write_text(foreign)
        error_line(lambda: AudioClassifier.from_pretrained(tmp_path), str(tmp_path), "no config.json of an audiomae")
    path.unlink()
    error_line(lambda: AudioClassifier.from_pretrained(tmp_path), "audiomae.checkpoints reads other formats")


def test_no_such_folder(tmp_path: Path):
    missing = tmp_path / "no"
    error_line(lambda: AudioMAE.from_pretrained(missing), f"no such checkpoint: {missing}", kind=FileNotFoundError)
    error_line(lambda: AudioMAE.from_pretrained(tmp_path), f"{tmp_path} is a directory without model.safetensors or")


def test_the_card(tmp_path: Path):
    for model, tag in ((pretrained(), "feature-extraction"), (classifier(), "audio-classification")):
        folder, name = tmp_path / tag, type(model).__name__
        model.save_pretrained(folder)
        card = ModelCard.load(folder / "README.md")
        assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("audiomae", tag, None)
        assert {"audio", "masked-autoencoder", "pytorch_model_hub_mixin"} <= set(card.data.tags)
        assert f"from audiomae import {name}\n\nmodel = {name}.from_pretrained(" in card.text
        assert "https://arxiv.org/abs/2207.06405" in card.text
    (folder / "README.md").write_text("mine")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_files_have_ordinary_permissions(tmp_path: Path):
    pretrained().save_pretrained(tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes.keys() == {"model.safetensors", "config.json", "README.md"}
    assert len(set(modes.values())) == 1


def test_pushed_and_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Api:
        def __init__(self, token: str | None):
            assert token == "secret"

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = classifier(labels=LABELS)
    url = model.push_to_hub("someone/sounds", token="secret", model_card_kwargs={"repo_id": "someone/sounds"})
    assert url == "https://hub/someone/sounds"
    assert 'from_pretrained("someone/sounds")' in (tmp_path / "someone" / "sounds" / "README.md").read_text()

    asked = serve(monkeypatch, tmp_path / "someone" / "sounds")
    cache = tmp_path / "cache"
    back = AudioClassifier.from_pretrained("someone/sounds", revision="v1", token="secret", cache_dir=cache)
    assert back.config == model.config
    assert_same(back.state_dict(), model.state_dict())
    assert [(repo_id, filename) for repo_id, filename, _ in asked] == [
        ("someone/sounds", "model.safetensors"),
        ("someone/sounds", "config.json"),
    ]
    for _, _, options in asked:
        assert (options["revision"], options["token"], options["cache_dir"]) == ("v1", "secret", cache)
        assert (options["force_download"], options["local_files_only"]) == (False, False)
    assert load_classifier("someone/sounds").config == model.config
    assert load_encoder("someone/sounds")[0].encoder_settings() == model.config.encoder_settings()


def test_python_sees_no_difference(tmp_path: Path):
    model = classifier(impl="reference", labels=LABELS)
    spec = torch.randn(2, 1, 64, 128)
    expected = model(spec)
    torch.save(model, tmp_path / "whole.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ]
    for other in copies:
        assert other.config == model.config
        assert_same(other.state_dict(), model.state_dict())
        torch.testing.assert_close(other(spec), expected, rtol=0, atol=0)
        other.save_pretrained(tmp_path / "copy")
        assert AudioClassifier.from_pretrained(tmp_path / "copy").config == model.config
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(spec), expected, rtol=0, atol=1e-6)
    parts = {name.partition(".")[0] for name in model.state_dict()}
    assert parts == {name for name, _ in model.named_children()} == {"encoder", "fc_norm", "head"}


def test_folders_of_pretrained_models(tmp_path: Path):
    model = pretrained(mean=-6.5, window=(2, 4), shift=(1, 2))
    model.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        config, state = load(source)
        assert config == model.config
        assert_same(state, model.state_dict())
    assert load_model(tmp_path).config == model.config
    config, encoder = load_encoder(tmp_path)
    assert config.mean == -6.5
    other = pretrained()
    assert start_encoder(other.encoder, tmp_path) == ["decoder left out: 25 tensors"]
    for started in (encoder, other.encoder):
        assert_same(started.state_dict(), model.encoder.state_dict())
    error_line(lambda: load_classifier(tmp_path), f"{tmp_path} has no fc_norm.weight, expected a classifier")


def test_folders_of_classifiers(tmp_path: Path):
    model = classifier(labels=LABELS, multi_label=False)
    model.save_pretrained(tmp_path)
    back = load_classifier(tmp_path, impl="reference")
    assert (back.config, back.impl) == (model.config, "reference")
    other = classifier()
    assert start_classifier(other, tmp_path) == ["head of 5 classes taken from the file"]
    for started in (back, other):
        assert_same(started.state_dict(), model.state_dict())
    error_line(
        lambda: start_classifier(classifier(labels=LABELS[::-1]), tmp_path), "has 'dog' as class 0, expected 'ö'"
    )


def test_folders_of_pickled_weights(tmp_path: Path):
    model = pretrained(mean=-6.5)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert load(tmp_path)[0] == model.config
    assert_same(AudioMAE.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_configuration_counts_beside_our_weights_alone(tmp_path: Path):
    model = pretrained(mean=-6.5)
    path = tmp_path / "model.safetensors"
    for foreign in ('{"architecture": "vit_base_patch16_224", "num_classes": 0}', "no JSON"):
        (tmp_path / "config.json").write_text(foreign)
        save_file(to_timm(model.state_dict()), path)
        assert load_encoder(tmp_path)[0].mean == pytest.approx(-4.2677393)
    save_weights(path, model)
    assert load(tmp_path)[0] == AudioMAE.from_pretrained(tmp_path).config == model.config
    save_weights(tmp_path / "other.safetensors", model)
    assert AudioMAE.from_pretrained(tmp_path / "other.safetensors").config == model.config
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    assert load(tmp_path / "other.safetensors")[0].mean == pytest.approx(-4.2677393)


def test_repositories_without_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = serve(monkeypatch, tmp_path)
    for read in (load, AudioMAE.from_pretrained):
        error_line(lambda read=read: read("a/b"), "a/b is no file", "has no model.safetensors or pytorch_model.bin")
    model = pretrained()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    asked.clear()
    assert_same(load("a/b")[1], model.state_dict())
    assert [filename for _, filename, _ in asked] == ["model.safetensors", "config.json"]
    error_line(lambda: AudioMAE.from_pretrained("a/b"), "a/b: no config.json of an audiomae model")


def test_a_configuration_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Shapes would tell the rest, but not that the configuration differs from what they tell."""
    save_file(pretrained().state_dict(), tmp_path / "model.safetensors")

    def download(repo_id: str, filename: str, **_: Any) -> str:
        if filename == "config.json":
            raise LocalEntryNotFoundError("Cannot reach the Hub.\nCheck your connection.")
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    error_line(lambda: load("a/b"), "its config.json cannot be had from the Hugging Face Hub: Cannot reach the Hub.")

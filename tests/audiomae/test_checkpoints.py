"""Weights in and out: official and native files there and back, renaming, inference of configurations, the Hub."""

import os
import pathlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from audiomae import checkpoints
from audiomae.checkpoints import load, load_model, save_official, save_weights, start_encoder
from audiomae.model import AudioMAE

from .official import (
    WIDTH,
    assert_same,
    error_line,
    official_encoder,
    official_state,
    random_model,
    save_as_official,
    small_config,
    small_encoder,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("kind", "local", "global_", "heads"), [("local", 3, 0, 8), ("hybrid", 2, 1, 8), ("global", 0, 2, 16)]
)
def test_official_there_and_back(tmp_path: Path, kind: str, local: int, global_: int, heads: int):
    official = official_state(local, global_, heads=heads)
    path = save_as_official(tmp_path / "pretrained.pth", official)
    config, state = load(path)
    assert config == small_config(
        decoder=kind,
        decoder_depth=local + global_,
        decoder_heads=heads,
        hybrid_global_layers=global_ if kind == "hybrid" else 4,
    )
    assert_same(checkpoints.to_official(state), official)

    model = load_model(path, impl="reference")
    assert model.impl == "reference"
    save_official(tmp_path / "again.pth", model)
    assert_same(torch.load(tmp_path / "again.pth", weights_only=True)["model"], official)
    assert_same(load(tmp_path / "again.pth")[1], state)


@pytest.mark.parametrize("zipped", [True, False])
def test_official_file_of_any_age(tmp_path: Path, zipped: bool):
    official = official_state()
    torch.save({"model": official}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(load(tmp_path / "a.pth")[1], checkpoints.from_official(official))


def test_official_file_of_python_3_13(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """That version alone keeps its path classes in another module."""
    monkeypatch.setattr(pathlib.PosixPath, "__module__", "pathlib._local")
    monkeypatch.setitem(sys.modules, "pathlib._local", pathlib)
    official = official_state()
    path = save_as_official(tmp_path / "a.pth", official)
    assert b"pathlib._local" in path.read_bytes()
    assert_same(load(path)[1], checkpoints.from_official(official))


def test_official_copy_keeps_the_settings_that_shapes_do_not_tell(tmp_path: Path):
    config = small_config(window=(2, 4), shift=(1, 2), patch_stride=(10, 10), embed_dim=36, num_heads=2)
    model = random_model(config)
    save_official(tmp_path / "a.pth", model)
    loaded, state = load(tmp_path / "a.pth")
    assert loaded == config
    assert_same(state, model.state_dict())


@pytest.mark.parametrize("layout", ["true", "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_layout_is_recognised(tmp_path: Path, layout: str, dtype: torch.dtype):
    model = AudioMAE(small_config(position_grid=layout))
    state = {name: tensor.to(dtype) for name, tensor in checkpoints.to_official(model.state_dict()).items()}
    save_as_official(tmp_path / "a.pth", state)
    config, loaded = load(tmp_path / "a.pth")
    assert config.position_grid == layout
    assert_same(checkpoints.to_official(loaded), state)


def test_position_layouts_of_a_square_grid_are_one(tmp_path: Path):
    model = AudioMAE(small_config(spec_size=(128, 128), position_grid="official"))
    path = save_as_official(tmp_path / "a.pth", checkpoints.to_official(model.state_dict()))
    assert load(path)[0].position_grid == "true"


def test_newer_temperature(tmp_path: Path):
    official = official_state()
    stored = {
        name.replace("attn.tau", "attn.logit_scale"): torch.log(1 / value) if name.endswith("tau") else value
        for name, value in official.items()
    }
    torch.save({"model": stored}, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth")[1]
    for index in range(2):
        came, expected = loaded[f"decoder.blocks.{index}.attn.tau"], official[f"decoder_blocks.{index}.attn.tau"]
        torch.testing.assert_close(came, expected, rtol=1e-6, atol=0)


def test_names_of_gradients():
    model = AudioMAE(small_config())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    official = checkpoints.to_official(gradients)
    assert official["decoder_blocks.1.attn.tau"] is gradients["decoder.blocks.1.attn.tau"]
    assert official["mask_token"] is gradients["decoder.mask_token"]
    assert official.keys() == official_state().keys() - {"pos_embed", "decoder_pos_embed"}
    back = checkpoints.from_official(official)
    assert list(back) == list(gradients)
    assert all(back[name] is gradients[name] for name in gradients)


def test_names_of_any_part_and_value():
    ours = {"encoder.norm.weight": None, "decoder.pos_embed": "text", "encoder.blocks.11.mlp.fc1.bias": 3}
    theirs = {"norm.weight": None, "decoder_pos_embed": "text", "blocks.11.mlp.fc1.bias": 3}
    assert checkpoints.to_official(ours) == theirs
    assert checkpoints.from_official(theirs) == ours
    assert checkpoints.to_timm(ours) == {"norm.weight": None, "blocks.11.mlp.fc1.bias": 3}
    assert checkpoints.from_timm({"norm.weight": 1, "fc_norm.bias": 2, "head.weight": 3}) == {"encoder.norm.weight": 1}
    assert checkpoints.from_official({}) == checkpoints.to_timm({}) == {}


@pytest.mark.parametrize(
    ("rename", "name"),
    [
        (checkpoints.from_official, "head.weight"),
        (checkpoints.from_official, "encoder.norm.weight"),
        (checkpoints.from_official, "module.norm.weight"),
        (checkpoints.from_official, "decoder_normal.weight"),
        (checkpoints.to_official, "norm.weight"),
        (checkpoints.to_official, "encoder.head.weight"),
        (checkpoints.from_timm, "dist_token"),
        (checkpoints.from_timm, "decoder_norm.weight"),
        (checkpoints.to_timm, "head.weight"),
    ],
)
def test_unknown_names(rename: Callable, name: str):
    error_line(lambda: rename({name: 0}), f"unknown parameters: {name};", kind=ValueError)


@pytest.mark.parametrize("settings", [{}, {"window": (2, 4), "shift": (1, 2), "norm_target": False, "embed_dim": 36}])
def test_native_there_and_back(tmp_path: Path, settings: dict[str, Any]):
    model = random_model(small_config(**settings))
    save_weights(tmp_path / "a.safetensors", model)
    config, state = load(tmp_path / "a.safetensors")
    assert config == model.config
    assert_same(state, model.state_dict())
    assert_same(load_model(tmp_path / "a.safetensors").state_dict(), model.state_dict())
    save_weights(tmp_path / "b.safetensors", load(tmp_path / "a.safetensors"))
    config, state = load(tmp_path / "b.safetensors")
    assert config == model.config
    assert_same(state, model.state_dict())


def test_training_checkpoint(tmp_path: Path):
    model = random_model(small_config(shift=(2, 2)))
    content = {checkpoints.NATIVE_MODEL: model.state_dict(), checkpoints.NATIVE_CONFIG: model.config.to_dict()}
    torch.save({**content, "step": 7, "optimizer": {"state": {0: torch.randn(3)}}}, tmp_path / "last.pt")
    config, state = load(tmp_path / "last.pt")
    assert config == model.config
    assert_same(state, model.state_dict())


def test_save_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.safetensors"
    model = random_model(small_config())
    save_weights(path, model)
    before = path.read_bytes()

    def fail_half_way(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", fail_half_way)
    error_line(lambda: save_weights(path, random_model(small_config())), "no space left", kind=OSError)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("save", [save_weights, save_official])
def test_saved_files_have_ordinary_permissions(tmp_path: Path, save: Callable):
    (tmp_path / "ordinary").touch()
    save(tmp_path / "a", AudioMAE(small_config()))
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("save", [save_weights, save_official])
def test_save_refuses_what_could_not_be_loaded(tmp_path: Path, save: Callable):
    model = AudioMAE(small_config())
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    error_line(lambda: save(tmp_path / "a", (model.config, wrapped)), "missing", "unknown tensors: module.encoder.")
    error_line(lambda: save(tmp_path / "no" / "a", model), "no such directory", kind=FileNotFoundError)
    assert os.listdir(tmp_path) == []


def test_encoder_alone(tmp_path: Path):
    model = random_model(small_config())
    encoder = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("encoder.")}
    path = tmp_path / "encoder.safetensors"
    save_weights(path, (model.config, encoder))
    assert_same(load(path)[1], encoder)
    error_line(lambda: load_model(path), str(path), "without a decoder", "start_encoder")
    target = small_encoder()
    assert start_encoder(target, path) == []
    assert_same(target.state_dict(), model.encoder.state_dict())


def test_channels_that_share_their_weights(tmp_path: Path):
    state = official_encoder()
    expected = state["patch_embed.proj.weight"].repeat(1, 3, 1, 1)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].expand(-1, 3, -1, -1)
    config, loaded = load(path := save_as_official(tmp_path / "a.pth", state))
    assert config.in_channels == 3
    torch.testing.assert_close(loaded["encoder.patch_embed.proj.weight"], expected, rtol=0, atol=0)
    save_weights(tmp_path / "a.safetensors", (config, loaded))
    assert_same(load(tmp_path / "a.safetensors")[1], loaded)
    target = small_encoder()
    assert start_encoder(target, path) == ["patch weights of three channels summed into one"]
    torch.testing.assert_close(target.patch_embed.proj.weight, expected.sum(1, keepdim=True), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("patch_size", "channels", "positions", "spec_size"),
    [
        ((16, 16), 1, 512, (1024, 128)),
        ((32, 16), 1, 256, (1024, 128)),
        ((16, 32), 1, 128, (512, 128)),
        ((16, 16), 1, 64, (128, 128)),
        ((16, 16), 1, 256, (512, 128)),
        ((16, 16), 3, 256, (256, 256)),
        ((16, 16), 1, 196, (224, 224)),
        ((16, 16), 3, 24, (48, 128)),
        ((14, 14), 3, 256, (224, 224)),
    ],
)
def test_input_size_is_inferred(
    tmp_path: Path, patch_size: tuple[int, int], channels: int, positions: int, spec_size: tuple[int, int]
):
    state = official_encoder()
    state["patch_embed.proj.weight"] = torch.randn(WIDTH, channels, *patch_size)
    state["pos_embed"] = torch.randn(1, 1 + positions, WIDTH)
    config, _ = load(save_as_official(tmp_path / "a.pth", state))
    assert (config.spec_size, config.patch_size, config.patch_stride) == (spec_size, patch_size, patch_size)


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (128, 2), (384, 6), (1280, 16)])
def test_heads_follow_from_the_width(tmp_path: Path, width: int, heads: int):
    path = save_as_official(tmp_path / "a.pth", official_encoder(width=width, depth=1))
    assert load(path)[0].num_heads == heads


def test_a_shorter_decoder_is_another_depth(tmp_path: Path):
    state = {name: tensor for name, tensor in official_state().items() if not name.startswith("decoder_blocks.1")}
    assert load(save_as_official(tmp_path / "a.pth", state))[0].decoder_depth == 1


def test_hub_takes_the_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub.errors import EntryNotFoundError

    model = random_model(small_config())
    asked = []

    def download(repo_id: str, filename: str, **_: Any) -> str:
        asked.append((repo_id, filename))
        if filename == "model.safetensors":
            raise EntryNotFoundError("404 Client Error.\n\nEntry not found")
        torch.save(checkpoints.to_timm(model.state_dict()), tmp_path / filename)
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    repo_id = "someone/vit_tiny_patch16_64_128.audio"
    _, state = load(repo_id)
    assert_same(checkpoints.to_timm(state), checkpoints.to_timm(model.state_dict()))
    assert asked == [(repo_id, "model.safetensors"), (repo_id, "pytorch_model.bin")]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls = []

    def download(repo_id: str, filename: str, local_files_only: bool) -> str:
        calls.append(local_files_only)
        raise LocalEntryNotFoundError("Cannot reach the Hub.\nCheck your connection.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    error_line(
        lambda: load("someone/audiomae"), "someone/audiomae is no file", "model.safetensors", "Cannot reach the Hub."
    )
    assert calls == [False, True]


def test_hub_refuses(monkeypatch: pytest.MonkeyPatch):
    def download(repo_id: str, filename: str, local_files_only: bool) -> str:
        raise OSError("401 Client Error.\nRepository Not Found")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    error_line(lambda: load("someone/audiomae"), "someone/audiomae", "401 Client Error.")

"""Files that cannot be used: each is refused with one line that says why, and no code that a file holds is run."""

import math
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from audiomae import checkpoints
from audiomae.checkpoints import load, start_encoder
from audiomae.model import AudioMAE

from .official import WIDTH, State, error_line, norm, official_state, save_as_official, small_config, small_encoder


def without(name: str, state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith(name)}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (partial(without, "decoder_pred.bias"), ["1 missing tensors: decoder.pred.bias"]),
        (
            partial(without, "blocks.1.norm1"),
            ["2 missing tensors: encoder.blocks.1.norm1.weight, enc"],
        ),
        (partial(without, "blocks.0.attn"), ["4 missing"]),
        (partial(without, "patch_embed"), ["no encoder.patch_embed.proj.weight", "Vision Transformer"]),
        (partial(without, "pos_embed"), ["no encoder.pos_embed"]),
        (partial(without, "blocks"), ["no encoder.blocks.0.mlp.fc1.weight"]),
        (partial(without, "decoder_embed"), ["no decoder.embed.weight"]),
        (
            lambda state: {**state, **norm("blocks.0.norm3", WIDTH)},
            ["2 unknown", "encoder.blocks.0.norm3.weight"],
        ),
        (
            lambda state: {**state, **{f"blocks.0.x{i}": torch.zeros(1) for i in range(9)}},
            ["9 unknown tensors: encoder.blocks.0.x0", "encoder.blocks.0.x3 and 5 more"],
        ),
        (lambda state: {**state, "predictor.weight": torch.zeros(1)}, ["unknown parameters: predictor.weight"]),
        (
            lambda state: {**state, "decoder_norm.bias": torch.zeros(7)},
            ["decoder.norm.bias has shape (7,), expected (64,)"],
        ),
        (
            lambda state: {**state, "pos_embed": torch.zeros(1, 65, WIDTH)},
            ["decoder.pos_embed has shape (1, 33, 64), expected (1, 65, 64)"],
        ),
        (lambda state: {**state, "pos_embed": torch.zeros(33, WIDTH)}, ["has shape (33, 192), expected 3 dimensions"]),
        (lambda state: {**state, "pos_embed": torch.zeros(1, 14, WIDTH)}, ["13 positions of patches (16, 16)", "128"]),
        (lambda state: {**state, "patch_embed.proj.weight": torch.zeros(100, 1, 16, 16)}, ["width of 100", "64"]),
        (
            lambda state: {name.replace("ks.1.attn.tau", "ks.1.attn.t"): value for name, value in state.items()},
            ["unknown tensors: decoder.blocks.1.attn.t"],
        ),
        (
            lambda state: {name.replace("decoder_blocks.0.attn.tau", "mask_token"): v for name, v in state.items()},
            ["decoder blocks [1] of 2 have attn.tau"],
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Callable[[State], State], facts: list[str]):
    state = change(official_state())
    path = save_as_official(tmp_path / "a.pth", state)
    error_line(lambda: load(path), str(path), *facts)
    error_line(lambda: start_encoder(small_encoder(), path), str(path), *facts)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 40),
        torch.zeros(1, 2).expand(1 << 40, 2),
        torch.zeros(WIDTH, 1).expand(WIDTH, 17),
        torch.zeros(1).expand(17),
        torch.zeros(1 << 10).as_strided((1 << 9, 1 << 9), (1, 1)),
        torch.zeros(3, 3, device="meta"),
    ],
)
def test_tensors_that_are_less_than_they_tell(tmp_path: Path, tensor: torch.Tensor):
    path = save_as_official(tmp_path / "a.pth", {**official_state(), "norm.weight": tensor})
    error_line(
        lambda: load(path), str(path), f"norm.weight has fewer numbers than its shape {tuple(tensor.shape)} tells"
    )


def test_native_configuration_that_does_not_fit(tmp_path: Path):
    model = AudioMAE(small_config())
    path = tmp_path / "a.pt"

    def save(config: Any, **settings: Any) -> None:
        torch.save({"model": model.state_dict(), "config": config and {**config, **settings}}, path)

    save(model.config.to_dict(), depth=3)
    error_line(lambda: load(path), str(path), "missing tensors: encoder.blocks.2.norm1.weight")
    save(model.config.to_dict(), colour="red")
    error_line(lambda: load(path), str(path), "unknown settings: colour")
    save(model.config.to_dict(), spec_size="wide")
    error_line(lambda: load(path), str(path))
    save(model.config.to_dict(), num_heads=5)
    error_line(lambda: load(path), str(path), "5 heads do not divide")
    torch.save({"model": model.state_dict(), "config": [1]}, path)
    error_line(lambda: load(path), str(path), "list", "expected a dictionary")
    save_file(model.state_dict(), path, {checkpoints.NATIVE_METADATA: "{"})
    error_line(lambda: load(path), str(path), "audiomae_config", "JSON")


def test_no_such_file(tmp_path: Path):
    for missing in (tmp_path / "a.pth", str(tmp_path / "a"), "pretrained.pth", "runs/last.pt"):
        error_line(lambda missing=missing: load(missing), f"no such checkpoint: {missing}", kind=FileNotFoundError)
    error_line(lambda: load(tmp_path), str(tmp_path), "is a directory")


def test_a_path_below_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    error_line(lambda: load("runs/last"), "no such checkpoint: runs/last", kind=FileNotFoundError)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"", ["is empty"]),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", ["neither", "<!DOCTYPE html>"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["neither", "version https://git-lfs"]),
        (b"\x13\x37" * 500, ["neither"]),
        (b"PK\x03\x04" + b"\x37" * 500, ["truncated, corrupt"]),
        (b"\x80\x02" + b"\x37" * 500, ["truncated, corrupt"]),
        (pickle.dumps([1, 2], protocol=2), ["truncated, corrupt"]),
    ],
)
def test_no_checkpoint(tmp_path: Path, content: bytes, facts: list[str]):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    error_line(lambda: load(path), str(path), *facts)


@pytest.mark.parametrize("layout", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [1e-9, 1e-5, 0.01, 0.5, 0.9, 1.0])
def test_truncated(tmp_path: Path, layout: str, share: float):
    path = tmp_path / "a"
    tensors = {"cls_token": torch.randn(1, 1, 20_000), "pos_embed": torch.randn(1, 5, 20_000)}
    if layout == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=layout == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: min(math.ceil(len(whole) * share), len(whole) - 1)])
    error_line(lambda: load(path), str(path))


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Settings:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(tmp_path: Path, zipped: bool):
    path, marker = tmp_path / "a.pth", tmp_path / "marker"
    content = {"model": official_state(), "args": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    error_line(lambda: load(path), str(path), f"{os.mkdir.__module__}.mkdir", "refused")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "name"), [(Settings(), "Settings"), (nn.Linear(2, 2), "torch.nn.modules.linear.Linear")]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_classes_are_refused_by_name(tmp_path: Path, content: object, name: str, zipped: bool):
    torch.save({"model": content}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    error_line(lambda: load(tmp_path / "a.pth"), str(tmp_path), name, "refused")


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ([torch.zeros(1)], ["holds list, expected a dictionary of tensors"]),
        (torch.zeros(1), ["holds Tensor"]),
        ({"model": None}, ["holds NoneType"]),
        ({"model": {}}, ["no encoder.patch_embed.proj.weight"]),
        ({"model": {"norm.weight": [1.0]}}, ["has list under 'norm.weight', expected tensors by name"]),
        ({"epoch": 3, "optimizer": {}}, ["has int under 'epoch'"]),
        ({0: torch.zeros(1)}, ["Tensor under 0"]),
    ],
)
def test_no_dictionary_of_tensors(tmp_path: Path, content: object, facts: list[str]):
    torch.save(content, tmp_path / "a.pth")
    error_line(lambda: load(tmp_path / "a.pth"), str(tmp_path), *facts)

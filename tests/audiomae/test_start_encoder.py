"""Encoders that start from timm, fine-tuned, image and longer-clip checkpoints; what is changed is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from audiomae import checkpoints
from audiomae.checkpoints import load, load_model, start_encoder
from audiomae.positions import fit_positions

from .official import (
    DEPTH,
    HEADS,
    SPEC_SIZE,
    WIDTH,
    State,
    assert_same,
    error_line,
    linear,
    official_encoder,
    official_state,
    save_as_official,
    small_encoder,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def timm_model(**settings: Any) -> VisionTransformer:
    sizes = {"img_size": SPEC_SIZE, "in_chans": 1, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    model = VisionTransformer(**{**sizes, "num_classes": 5, **settings}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def save_timm(path: Path, state: State, layout: str) -> Path:
    match layout:
        case "safetensors":
            save_file(state, path)
        case "bare":
            torch.save(state, path)
        case "state_dict":
            torch.save({"state_dict": state, "epoch": 3, "arch": "vit"}, path)
    return path


@pytest.mark.parametrize("layout", ["safetensors", "bare", "state_dict"])
@pytest.mark.parametrize("impl", ["reference", "auto"])
@torch.no_grad()
def test_timm_computes_the_same(tmp_path: Path, layout: str, impl: str):
    source = timm_model()
    path = save_timm(tmp_path / "weights.bin", source.state_dict(), layout)
    config, state = load(path)
    assert (config.spec_size, config.num_heads, config.mlp_ratio) == (SPEC_SIZE, HEADS, 4.0)
    assert all(name.startswith("encoder.") for name in state)

    encoder = small_encoder(impl=impl)
    assert start_encoder(encoder, path) == ["classifier left out: head"]
    spec = torch.randn(2, 1, *SPEC_SIZE)
    torch.testing.assert_close(encoder(spec), source.forward_features(spec), rtol=0, atol=1e-5)

    back = checkpoints.to_timm({f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()})
    head = {name: tensor for name, tensor in source.state_dict().items() if name.startswith("head.")}
    timm_model().load_state_dict({**back, **head}, strict=True)
    assert_same(back, {name: tensor for name, tensor in source.state_dict().items() if name not in head})


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"reg_tokens": 2}, "reg_token"), ({"qk_norm": True}, "q_norm"), ({"init_values": 1.0}, "ls1")],
)
def test_timm_of_another_architecture(tmp_path: Path, settings: dict[str, Any], name: str):
    path = save_timm(tmp_path / "a.safetensors", timm_model(**settings).state_dict(), "safetensors")
    error_line(lambda: start_encoder(small_encoder(), path), str(path), name)


def test_start_from_a_fine_tuned_official_model(tmp_path: Path):
    official = {**official_encoder(final_norm="fc_norm"), **linear("head", WIDTH, 527)}
    path = save_as_official(tmp_path / "finetuned.pth", official)
    state = load(path)[1]
    assert_same(state, checkpoints.from_timm(official))
    assert not any("norm." in name and "blocks" not in name for name in state)
    error_line(lambda: load_model(path), "without a decoder")

    encoder = small_encoder()
    kept = torch.randn_like(encoder.norm.weight)
    encoder.norm.weight.data.copy_(kept)
    assert start_encoder(encoder, path) == [
        "classifier left out: fc_norm, head",
        "not in the file and kept as they are: norm.weight, norm.bias",
    ]
    torch.testing.assert_close(encoder.norm.weight.data, kept, rtol=0, atol=0)
    loaded = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("norm.")}
    assert_same(loaded, {name: official[name] for name in loaded})


@pytest.mark.parametrize("decoder", [True, False])
def test_start_from_image_mae(tmp_path: Path, decoder: bool):
    image = official_state(0, 2, grid=(14, 14), channels=3) if decoder else official_encoder((14, 14), channels=3)
    path = save_as_official(tmp_path / "mae.pth", image)
    config, _ = load(path)
    assert (config.spec_size, config.in_channels, config.decoder) == ((224, 224), 3, "global" if decoder else "local")

    encoder = small_encoder((1024, 128))
    notes = start_encoder(encoder, path)
    assert notes == [
        *(["decoder left out: 32 tensors"] if decoder else []),
        "patch weights of three channels summed into one",
        "position embedding interpolated from a grid of (14, 14) to (64, 8)",
    ]
    spec = torch.randn(1, 1, 1024, 128, dtype=torch.float64)
    expected = F.conv2d(spec.expand(-1, 3, -1, -1), image["patch_embed.proj.weight"].double(), stride=16)
    came = F.conv2d(spec, encoder.patch_embed.proj.weight.double(), stride=16)
    torch.testing.assert_close(came, expected, rtol=0, atol=1e-5)
    expected = fit_positions(image["pos_embed"], (14, 14), (64, 8))[0]
    torch.testing.assert_close(encoder.pos_embed, expected, rtol=0, atol=0)
    same = {name: image[name] for name in encoder.state_dict() if name not in ("pos_embed", "patch_embed.proj.weight")}
    assert_same({name: encoder.state_dict()[name] for name in same}, same)


def test_start_with_three_channels_keeps_them(tmp_path: Path):
    image = official_encoder((14, 14), channels=3)
    path = save_as_official(tmp_path / "mae.pth", image)
    encoder = small_encoder((224, 224), in_channels=3)
    assert start_encoder(encoder, path) == []
    assert_same(encoder.state_dict(), image)


def test_start_on_a_shorter_clip_crops_positions(tmp_path: Path):
    official = official_encoder((64, 8))
    path = save_as_official(tmp_path / "a.pth", official)
    encoder = small_encoder((512, 128))
    assert start_encoder(encoder, path) == ["position embedding cropped to the first 32 of 64 time steps"]
    torch.testing.assert_close(encoder.pos_embed, official["pos_embed"][:, :257], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"patch_size": (32, 16)}, "patch size is (16, 16), expected (32, 16)"),
        ({"depth": 3}, "depth is 2, expected 3"),
        ({"embed_dim": 384}, f"width is {WIDTH}, expected 384"),
        ({"num_heads": 6}, "heads is 3, expected 6"),
        ({"mlp_ratio": 2.0}, f"MLP width is {4 * WIDTH}, expected {2 * WIDTH}"),
        ({"in_channels": 2}, "input channels is 1, expected 2"),
    ],
)
def test_start_of_another_architecture(tmp_path: Path, settings: dict[str, Any], fact: str):
    path = save_as_official(tmp_path / "a.pth", official_encoder())
    encoder = small_encoder(**settings)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    error_line(lambda: start_encoder(encoder, path), f"{path} does not fit the encoder", fact)
    assert_same(encoder.state_dict(), before)

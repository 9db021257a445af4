"""Official checkpoints made up by the rules of their shapes, without the project's code, and models of that size."""

import argparse
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audiomae.checkpoints import CheckpointError
from audiomae.encoder import Encoder
from audiomae.grid import PatchGrid
from audiomae.model import AudioMAE, AudioMAEConfig

State = dict[str, Tensor]

WIDTH, HEADS, DEPTH = 192, 3, 2
DECODER_WIDTH, DECODER_HEADS = 64, 16
GRID = (4, 8)
SPEC_SIZE = (64, 128)


def linear(name: str, inputs: int, outputs: int) -> State:
    return {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}


def norm(name: str, width: int) -> State:
    return {f"{name}.weight": torch.randn(width), f"{name}.bias": torch.randn(width)}


def block(name: str, width: int) -> State:
    return {
        **norm(f"{name}.norm1", width),
        **linear(f"{name}.attn.qkv", width, 3 * width),
        **linear(f"{name}.attn.proj", width, width),
        **norm(f"{name}.norm2", width),
        **linear(f"{name}.mlp.fc1", width, 4 * width),
        **linear(f"{name}.mlp.fc2", 4 * width, width),
    }


def local_block(name: str, width: int, heads: int) -> State:
    return {
        **block(name, width),
        f"{name}.attn.tau": torch.rand(heads) + 0.5,
        **linear(f"{name}.attn.meta_mlp.fc1", 2, 384),
        **linear(f"{name}.attn.meta_mlp.fc2", 384, heads),
    }


def official_encoder(
    grid: tuple[int, int] = GRID, channels: int = 1, final_norm: str = "norm", width: int = WIDTH, depth: int = DEPTH
) -> State:
    return {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 1 + grid[0] * grid[1], width),
        "patch_embed.proj.weight": torch.randn(width, channels, 16, 16),
        "patch_embed.proj.bias": torch.randn(width),
        **{name: value for i in range(depth) for name, value in block(f"blocks.{i}", width).items()},
        **norm(final_norm, width),
    }


def official_state(
    local: int = 2, global_: int = 0, grid: tuple[int, int] = GRID, channels: int = 1, heads: int = DECODER_HEADS
) -> State:
    """The names and shapes of the official pre-training model, with random values."""
    state = {
        **official_encoder(grid, channels),
        "mask_token": torch.randn(1, 1, DECODER_WIDTH),
        "decoder_pos_embed": torch.randn(1, 1 + grid[0] * grid[1], DECODER_WIDTH),
        **linear("decoder_embed", WIDTH, DECODER_WIDTH),
        **norm("decoder_norm", DECODER_WIDTH),
        **linear("decoder_pred", DECODER_WIDTH, 256 * channels),
    }
    for i in range(local):
        state |= local_block(f"decoder_blocks.{i}", DECODER_WIDTH, heads)
    for i in range(local, local + global_):
        state |= block(f"decoder_blocks.{i}", DECODER_WIDTH)
    return state


def save_as_official(path: Path, state: State) -> Path:
    """Save as the official code does: weights among the other objects of a run."""
    args = argparse.Namespace(output_dir=pathlib.PosixPath("/runs/1"), blr=2e-4, dist_url="env://", data_path=None)
    parameter = nn.Parameter(torch.randn(3))
    parameter.grad = torch.randn(3)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    scaler = {"scale": 65536.0, "growth_factor": 2.0}
    content = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 31, "scaler": scaler, "args": args}
    torch.save(content, path)
    return path


def assert_same(came: State, expected: State) -> None:
    assert came.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(came[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def small_config(**settings: Any) -> AudioMAEConfig:
    defaults = {"spec_size": SPEC_SIZE, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    decoder = {"decoder_dim": DECODER_WIDTH, "decoder_depth": 2, "decoder_heads": DECODER_HEADS}
    return AudioMAEConfig(**{**defaults, **decoder, **settings})


def random_model(config: AudioMAEConfig) -> AudioMAE:
    model = AudioMAE(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model


def small_encoder(
    spec_size: tuple[int, int] = SPEC_SIZE, patch_size: tuple[int, int] = (16, 16), **settings
) -> Encoder:
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return Encoder(PatchGrid(spec_size, patch_size, patch_size), **{**sizes, **settings})


def error_line(call: Callable[[], object], *facts: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for fact in facts:
        assert fact in line, f"{fact!r} is not in {line!r}"

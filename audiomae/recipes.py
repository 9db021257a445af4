"""The published settings by task (arXiv 2207.06405, table 3), and the demo: functions that return a configuration."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from audiomae.model import AudioMAEConfig
from audiomae.training.config import PretrainConfig


def pretrain_audioset(variant: str = "paper") -> PretrainConfig:
    """Pre-training on AudioSet-2M.

    Args:
        variant: ``"paper"``: its table 3. ``"released"``: its code, which trains for 33 epochs to a learning rate of
            0, draws the gain from Beta(10, 10) + 0.5, has dropout in the position bias, positions on a transposed
            grid, and does not move the crop (its cyclic roll draws from the wrong axis, and clips last 10 s).

    Raises:
        ValueError: Another variant.
    """
    paper = PretrainConfig(recipe="pretrain-audioset", output_dir=Path("runs/pretrain-audioset"))
    if variant == "paper":
        return paper
    if variant != "released":
        raise ValueError(f"variant is {variant!r}, expected 'paper' or 'released'")
    return replace(
        paper,
        variant="released",
        epochs=33,
        min_lr=0.0,
        crop="start",
        gain="beta",
        model=AudioMAEConfig(bias_dropout=0.1, position_grid="official"),
    )


def demo(variant: str = "paper") -> PretrainConfig:
    """Pre-training on the demo clips, sized for some minutes on two CPU cores.

    Raises:
        ValueError: A variant other than ``"paper"``: no code was released for it.
    """
    if variant != "paper":
        raise ValueError(f"recipe demo has no variant {variant!r}, only 'paper'")
    return PretrainConfig(
        recipe="demo",
        output_dir=Path("runs/demo"),
        epochs=30,
        warmup_epochs=2,
        batch_size=8,
        repeats=2,
        base_lr=3.2e-2,
        clip_seconds=None,
        log_every=10,
        picture_every=10,
        keep_every=0,
        model=AudioMAEConfig(
            spec_size=(256, 128),
            embed_dim=192,
            depth=4,
            num_heads=3,
            decoder_dim=128,
            decoder_depth=4,
            decoder_heads=4,
        ),
    )


PRETRAIN_RECIPES: dict[str, Callable[[str], PretrainConfig]] = {"demo": demo, "pretrain-audioset": pretrain_audioset}
"""Recipes of ``audiomae.pretrain`` by name."""

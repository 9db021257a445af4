"""The published settings by task (arXiv 2207.06405, table 3), and the demo: functions that return a configuration."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from audiomae.config import EncoderConfig
from audiomae.model import AudioMAEConfig
from audiomae.training.config import FinetuneConfig, PretrainConfig


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
    if not _is_released(variant):
        return paper
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
    _refuse_released("demo", variant)
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


def finetune_audioset(variant: str = "paper") -> FinetuneConfig:
    """Fine-tuning on AudioSet-2M: epochs of 200,000 clips, rare classes more often.

    Args:
        variant: ``"paper"``, or ``"released"``: batches of 256, a warm-up of 10 epochs, and the optimiser, layer-wise
            decay, masking ratios and gain of the published code, whose roll moves nothing.

    Raises:
        ValueError: Another variant.
    """
    paper = FinetuneConfig(
        recipe="finetune-audioset",
        output_dir=Path("runs/finetune-audioset"),
        dataset="audioset",
        multi_label=True,
        select="test",
        epochs=100,
        warmup_epochs=20,
        batch_size=512,
        base_lr=2e-4,
        balanced_clips=200_000,
    )
    return replace(_released(paper), batch_size=256, warmup_epochs=10) if _is_released(variant) else paper


def finetune_audioset_20k(variant: str = "paper") -> FinetuneConfig:
    """Fine-tuning on the balanced part of AudioSet; variants and errors as for :func:`finetune_audioset`."""
    paper = FinetuneConfig(
        recipe="finetune-audioset-20k",
        output_dir=Path("runs/finetune-audioset-20k"),
        dataset="audioset-20k",
        multi_label=True,
        select="test",
        epochs=60,
        warmup_epochs=4,
        batch_size=32,
        base_lr=1e-3,
    )
    return _released(paper) if _is_released(variant) else paper


def esc50(variant: str = "paper") -> FinetuneConfig:
    """Fine-tuning on ESC-50, fold by fold; errors as for :func:`finetune_audioset`.

    Args:
        variant: ``"paper"``, or ``"released"``: 50 epochs with a warm-up of 5, another optimiser, no patch dropped, and
            the widths of SpecAugment's masks in time and frequency exchanged.
    """
    paper = FinetuneConfig(
        recipe="esc50",
        output_dir=Path("runs/esc50"),
        dataset="esc50",
        select="test",
        epochs=60,
        warmup_epochs=4,
        batch_size=64,
        base_lr=1e-3,
        loss="ce",
        mixup=0.0,
        time_mask=96,
        frequency_mask=24,
        model=EncoderConfig(spec_size=(512, 128), mean=-6.627, std=5.359),
    )
    if not _is_released(variant):
        return paper
    return replace(
        _released(paper),
        epochs=50,
        warmup_epochs=5,
        weight_decay=0.05,
        mask_ratio_time=0.0,
        mask_ratio_frequency=0.0,
        gain=False,
        time_mask=24,
        frequency_mask=96,
    )


def spc1(variant: str = "paper") -> FinetuneConfig:
    """Fine-tuning on Speech Commands v1: ten words, silence and unknown.

    Raises:
        ValueError: A variant other than ``"paper"``: no code was released for it.
    """
    _refuse_released("spc1", variant)
    return replace(
        spc2(),
        recipe="spc1",
        output_dir=Path("runs/spc1"),
        dataset="speech-commands-v1",
        epochs=10,
        warmup_epochs=1,
        model=EncoderConfig(spec_size=(128, 128), mean=-6.702, std=5.448),
    )


def spc2(variant: str = "paper") -> FinetuneConfig:
    """Fine-tuning on the 35 words of Speech Commands v2.

    Raises:
        ValueError: A variant other than ``"paper"``: no settings were released for it.
    """
    _refuse_released("spc2", variant)
    return FinetuneConfig(
        recipe="spc2",
        output_dir=Path("runs/spc2"),
        dataset="speech-commands-v2",
        epochs=60,
        warmup_epochs=4,
        batch_size=256,
        base_lr=1e-3,
        noise_db=20.0,
        time_mask=48,
        frequency_mask=48,
        model=EncoderConfig(spec_size=(128, 128), mean=-6.846, std=5.565),
    )


def voxceleb_sid(variant: str = "paper") -> FinetuneConfig:
    """Fine-tuning on speaker identification, VoxCeleb1.

    Raises:
        ValueError: A variant other than ``"paper"``: no code was released for it.
    """
    _refuse_released("voxceleb-sid", variant)
    return FinetuneConfig(
        recipe="voxceleb-sid",
        output_dir=Path("runs/voxceleb-sid"),
        dataset="voxceleb1",
        epochs=60,
        warmup_epochs=4,
        batch_size=64,
        base_lr=1e-3,
        loss="ce",
        mixup=0.0,
        noise_db=20.0,
        model=EncoderConfig(mean=-6.370, std=3.074),
    )


def finetune_demo(variant: str = "paper") -> FinetuneConfig:
    """Fine-tuning of the model that the recipe ``demo`` pre-trains, on the kinds of the demo clips.

    Raises:
        ValueError: A variant other than ``"paper"``: no code was released for it.
    """
    _refuse_released("demo", variant)
    return FinetuneConfig(
        recipe="demo",
        output_dir=Path("runs/finetune-demo"),
        dataset="demo",
        epochs=30,
        warmup_epochs=3,
        batch_size=8,
        repeats=2,
        base_lr=1.6e-2,
        loss="ce",
        mixup=0.0,
        time_mask=48,
        frequency_mask=24,
        log_every=10,
        keep_every=0,
        model=EncoderConfig(**demo().model.encoder_settings()),
    )


def _released(paper: FinetuneConfig) -> FinetuneConfig:
    """What the published fine-tuning code does differently on all data sets.

    Its cyclic roll draws from the wrong axis and moves nothing.
    """
    return replace(
        paper,
        variant="released",
        betas=(0.9, 0.999),
        weight_decay=5e-4,
        layer_decay=0.75,
        mask_ratio_time=0.2,
        mask_ratio_frequency=0.2,
        gain=True,
        roll=False,
        model=replace(paper.model, position_grid="official"),
    )


def _is_released(variant: str) -> bool:
    if variant not in ("paper", "released"):
        raise ValueError(f"variant is {variant!r}, expected 'paper' or 'released'")
    return variant == "released"


def _refuse_released(recipe: str, variant: str) -> None:
    if variant != "paper":
        raise ValueError(f"recipe {recipe} has no variant {variant!r}, only 'paper'")


PRETRAIN_RECIPES: dict[str, Callable[[str], PretrainConfig]] = {"demo": demo, "pretrain-audioset": pretrain_audioset}
"""Recipes of ``audiomae.pretrain`` by name."""

FINETUNE_RECIPES: dict[str, Callable[[str], FinetuneConfig]] = {
    "demo": finetune_demo,
    "finetune-audioset": finetune_audioset,
    "finetune-audioset-20k": finetune_audioset_20k,
    "esc50": esc50,
    "spc1": spc1,
    "spc2": spc2,
    "voxceleb-sid": voxceleb_sid,
}
"""Recipes of ``audiomae.finetune`` by name."""

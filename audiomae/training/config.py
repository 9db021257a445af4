"""What a pre-training run is made of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from audiomae.model import AudioMAEConfig


class SetupError(ValueError):
    """What is wrong with a run, found before any work."""


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run. A recipe gives them all; flags change single ones."""

    recipe: str = "demo"
    """Recipe that gives the defaults: demo or pretrain-audioset."""
    variant: Literal["paper", "released"] = "paper"
    """Settings as the paper prints them, or as its released code has them."""
    size: str | None = None
    """Encoder size over the recipe's: tiny, small, base, large or huge."""

    data: str | None = None
    """Folder of sound files, CSV, or AST / Audio-MAE JSON manifest. None: the demo clips that ship with the package."""
    output_dir: Path = Path("runs/pretrain")
    """Where log.jsonl, TensorBoard files, pictures and checkpoints go."""
    init_from: str | None = None
    """Weights that start the encoder: a file or hub id of Audio-MAE, timm, image MAE or ImageNet ViT."""
    resume: str | None = None
    """Checkpoint to go on from; "auto" is the last one of the output folder, if there is one."""

    epochs: int = 32
    """Epochs to train."""
    warmup_epochs: float = 3.0
    """Epochs over which the learning rate rises from 0."""
    batch_size: int = 512
    """Clips in an optimiser step, over all ranks and accumulated micro-batches."""
    accumulation: int = 1
    """Micro-batches that a rank's share of a batch is split into, to save memory."""
    repeats: int = 1
    """Visits of each clip in an epoch, each with its own crop and mask."""
    base_lr: float = 2e-4
    """Learning rate for a batch of 256; the peak is this x batch_size / 256."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: float = 1e-4
    """AdamW's decay of every parameter of two or more dimensions."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of its two moments."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None does not clip."""

    mask: Literal["random", "time", "frequency", "time_frequency"] = "random"
    """Which patches are removed together."""
    mask_ratio: float = 0.8
    """Share of patches (time steps, with time and time_frequency) that is removed."""
    mask_ratio_frequency: float = 0.5
    """Share of frequencies that time_frequency removes."""

    clip_seconds: float | None = 10.0
    """Length of the crop, s, at most what the frames hold; they are padded to their number. None: what fills them."""
    crop: Literal["random", "start"] = "random"
    """Start of the crop: anywhere, going round at the end, or the clip's first sample."""
    gain: Literal["uniform", "beta"] = "uniform"
    """Random gain: uniform in decibels, or the released code's Beta(10, 10) + 0.5."""
    gain_db: float = 6.0
    """Largest uniform gain either way, dB."""
    workers: int | None = None
    """Processes that read clips, for each rank; None: up to 8 with a GPU, 1 on a CPU, where they take a processor."""

    fused: bool = False
    """Take the fastest form at hand of each operator instead of plain PyTorch."""
    compile: bool = False
    """Run the model through torch.compile."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast: auto is bf16 on GPUs and fp32 on CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of weights, order, crops, gains and masks."""

    log_every: int = 20
    """Steps between logged ones."""
    picture_every: int = 4
    """Epochs between pictures of reconstructions; 0 draws none."""
    save_every: int = 1
    """Epochs between saves of the last checkpoint; the final epoch is always saved."""
    keep_every: int = 8
    """Epochs between checkpoints that are kept; 0 keeps the last one alone."""

    model: AudioMAEConfig = field(default_factory=AudioMAEConfig)
    """Architecture."""

    def __post_init__(self) -> None:
        """Check single settings; what depends on data, devices or other settings is checked where they meet."""
        positive = (
            "epochs",
            "batch_size",
            "accumulation",
            "repeats",
            "base_lr",
            "log_every",
            "save_every",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in ("warmup_epochs", "min_lr", "weight_decay", "gain_db", "picture_every", "keep_every", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        for name in ("clip_grad", "clip_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}, expected at least 0")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}, expected at most the {self.epochs} epochs of the run: "
                "lower both"
            )
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}, expected less than 2**63")
        if self.model.in_channels != 1:
            raise ValueError(f"model.in_channels is {self.model.in_channels}, expected 1: clips are read as mono")

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.base_lr * self.batch_size / 256

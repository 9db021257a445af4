"""What a run is made of: the settings that all runs share, those of pre-training, and those of fine-tuning."""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch

from audiomae.config import EncoderConfig
from audiomae.data.log_mel_stats import read_stats
from audiomae.model import AudioMAEConfig

SMALL_BASE_LR = {2e-4: 5e-4, 1e-3: 2e-3}
"""Base learning rates of ViT-S by those of ViT-B."""


class SetupError(ValueError):
    """What is wrong with a run, found before any work; on a machine, the first rank tells it."""


class AgreedError(SetupError):
    """What all ranks know to be wrong; the main one tells it."""


class JoinError(SetupError):
    """A rank that others do not find; each tells it."""


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype that a model runs in under ``"bf16"``, ``"fp32"`` or ``"auto"``, which is bf16 on GPUs."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


@dataclass(frozen=True)
class RunConfig:
    """Settings that every training run has. A recipe gives them all; flags change single ones."""

    start_flag: ClassVar[str]
    """Flag that names weights to start from, for messages."""

    recipe: str = "demo"
    """Recipe that gives the defaults."""
    variant: Literal["paper", "released"] = "paper"
    """Settings as the paper prints them, or as its released code has them."""
    size: str | None = None
    """Encoder size over the recipe's: tiny, small, base, large or huge."""

    stats: Path | None = None
    """Mean and deviation of the input over the model's, as python -m audiomae.data.stats --out FILE writes them."""

    output_dir: Path = Path("runs/run")
    """Where log.jsonl, TensorBoard files, checkpoints and whatever else a run makes go."""
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
    """Visits of each clip in an epoch, each with its own random draws."""
    base_lr: float = 2e-4
    """Learning rate for a batch of 256; the peak is this x batch_size / 256."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: float = 1e-4
    """AdamW's decay of every parameter of two or more dimensions; in fine-tuning not of the class token."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of its two moments."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None does not clip."""

    workers: int | None = None
    """Processes that read clips, for each rank; None: up to 8 with a GPU, 1 on a CPU, where they take a processor."""
    fused: bool = False
    """Take the fastest form at hand of each operator instead of plain PyTorch."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile."""
    checkpoint_activations: bool = False
    """Compute what transformer blocks need in backward anew instead of keeping it: less memory, more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Each rank holds the whole model (DDP), or a shard of it, its gradients and its optimiser (FSDP2), for models that
    would not fit."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients travel between ranks; bf16 is half as much."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast: auto is bf16 on GPUs and fp32 on CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: auto takes a GPU where there is one."""
    seed: int = 0
    """Seed of weights, order, and all that is random about a clip."""

    log_every: int = 20
    """Steps between logged ones."""
    save_every: int = 1
    """Epochs between saves of the last checkpoint; the final epoch is always saved."""
    save_steps: int = 1000
    """Steps between saves within an epoch; 0 saves at the end of epochs alone."""
    keep_every: int = 8
    """Epochs between checkpoints that are kept; 0 keeps the last one alone."""

    max_skipped: float = 0.01
    """Share of an epoch's clips, and of those of a split that is evaluated, that may be skipped because they cannot be
    read; more of them end the run."""
    skip_nonfinite: int = 0
    """Steps of the run that may be left out because their loss or gradient is not finite; one more ends it."""
    hang_timeout: float = 1800.0
    """Seconds without any progress after which the run ends, and names the rank that holds it up; 0 waits for ever."""
    allow_outside: bool = False
    """Allow paths in manifests that lead out of the manifest's folder."""

    model: EncoderConfig = field(default_factory=EncoderConfig)
    """Architecture, and the statistics of its input."""

    def __post_init__(self) -> None:
        """Check single settings; what depends on data, devices or other settings is checked where they meet."""
        self.check_positive("epochs", "batch_size", "accumulation", "repeats", "base_lr", "log_every", "save_every")
        self.check_positive("clip_grad")
        self.check_not_negative("warmup_epochs", "min_lr", "weight_decay", "keep_every", "seed", "workers")
        self.check_not_negative("save_steps", "skip_nonfinite", "hang_timeout")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped is {self.max_skipped}, expected a share from 0 to 1")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}, expected at most the {self.epochs} epochs of the run: "
                "lower both"
            )
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}, expected less than 2**63")
        if self.model.in_channels != 1:
            raise ValueError(f"model.in_channels is {self.model.in_channels}, expected 1: clips are read as mono")

    def check_positive(self, *names: str) -> None:
        """Raise ValueError unless these settings are more than 0, or None."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")

    def check_not_negative(self, *names: str) -> None:
        """Raise ValueError unless these settings are at least 0, or None."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}, expected at least 0")

    def resized(self, size: str) -> Self:
        """Change the encoder to a published size: tiny, small, base, large or huge.

        Raises:
            ValueError: Another size.
        """
        return replace(self, size=size, model=self.model.resized(size))

    def with_stats(self, path: Path) -> Self:
        """Take the mean and deviation of the input from a file.

        Raises:
            StatsError: It holds something else.
            OSError: It cannot be read.
        """
        stats = read_stats(path)
        return replace(self, stats=path, model=replace(self.model, mean=stats.mean, std=stats.std))

    def check_stats(self) -> None:
        """Raise ValueError if the statistics are of another sample rate or number of mel bins than the model's."""
        if self.stats is None:
            return
        stats = read_stats(self.stats)
        found = {"sample_rate": stats.sample_rate, "num_mels": stats.num_mels}
        expected = {"sample_rate": self.model.sample_rate, "num_mels": self.model.spec_size[1]}
        for name, value in found.items():
            if value != expected[name]:
                raise ValueError(f"{self.stats} has a {name} of {value}, the model {expected[name]}")

    @property
    def rank_patience(self) -> float:
        """Seconds after which PyTorch gives up waiting for a rank: late, for the watchdog tells which one it was."""
        return max(1800.0, 2 * self.hang_timeout) if self.hang_timeout else timedelta(days=365).total_seconds()

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Settings of a pre-training run."""

    start_flag = "--init-from"

    output_dir: Path = Path("runs/pretrain")
    """Where log.jsonl, TensorBoard files, pictures and checkpoints go."""

    data: str | None = None
    """Folder of sound files, CSV, or AST / Audio-MAE JSON manifest. None: the demo clips that ship with the package."""
    init_from: str | None = None
    """Weights that start the encoder: a file or hub id of Audio-MAE, timm, image MAE or ImageNet ViT."""

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
    picture_every: int = 4
    """Epochs between pictures of reconstructions; 0 draws none."""

    model: AudioMAEConfig = field(default_factory=AudioMAEConfig)
    """Architecture, and the statistics of its input."""

    def __post_init__(self) -> None:
        """Check single settings."""
        super().__post_init__()
        self.check_positive("clip_seconds")
        self.check_not_negative("gain_db", "picture_every")


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Settings of a fine-tuning run."""

    start_flag = "--checkpoint"

    output_dir: Path = Path("runs/finetune")
    """Where log.jsonl, TensorBoard files, checkpoints, and reports on the splits go."""

    dataset: str = "demo"
    """Data set: audioset, audioset-20k, esc50, speech-commands-v1, speech-commands-v2, voxceleb1, demo, or manifest
    for your own lists of clips."""
    data: str | None = None
    """Folder of the data set; with manifest, the training clips: a CSV, a JSON, or a folder with one for each class."""
    valid_data: str | None = None
    """With manifest: clips that choose the best epoch."""
    test_data: str | None = None
    """With manifest: clips to report on at the end."""
    labels: str | None = None
    """With manifest: file of the classes, as AudioSet's class_labels_indices.csv or one a line. None: all there are."""
    multi_label: bool = False
    """With manifest: a clip can be of several classes."""
    fold: int | None = None
    """Fold of ESC-50 that is tested on; None runs all five and reports their mean and deviation."""

    checkpoint: str | None = None
    """Weights to start from: a file or hub id of Audio-MAE, timm, image MAE or ImageNet ViT. None: random ones."""
    reset_head: bool = False
    """Start with a new head though the checkpoint has one."""
    freeze: bool = False
    """Linear probe: train the norm and head on a frozen encoder that sees all patches."""

    select: Literal["valid", "test", "last"] = "valid"
    """Split that chooses the best epoch, or the last epoch. "test" is the protocol of AudioSet and ESC-50, which lack a
    validation split."""
    eval_every: int = 1
    """Epochs between evaluations on the split that chooses."""

    layer_decay: float = 1.0
    """Learning rate of a block over that of the block above it."""
    drop_path: float = 0.1
    """Stochastic depth: the probability that the last block drops a branch."""
    mask_ratio_time: float = 0.3
    """Share of time steps whose patches are dropped; 0 with frequency 0 drops none."""
    mask_ratio_frequency: float = 0.3
    """Share of frequencies whose patches are dropped."""
    loss: Literal["bce", "ce"] = "bce"
    """Binary cross-entropy of each class, or cross-entropy over the classes."""

    balanced_clips: int | None = None
    """Clips of an epoch, drawn without replacement, rare classes more often. None: each clip once."""
    gain: bool = False
    """Random gain of the released code: Beta(10, 10) + 0.5."""
    roll: bool = True
    """Roll each clip by a random offset; one longer than the input starts anywhere."""
    noise_db: float | None = None
    """Signal-to-noise ratio of the white noise that is added, dB; None adds none."""
    mixup: float = 0.5
    """Probability that a clip is mixed with another one, in waveform and labels."""
    mixup_alpha: float = 10.0
    """Shares of a mix come from Beta(alpha, alpha)."""
    time_mask: int = 192
    """SpecAugment: up to so many frames are set to 0."""
    frequency_mask: int = 48
    """SpecAugment: up to so many mel bins are set to 0."""

    def __post_init__(self) -> None:
        """Check single settings."""
        super().__post_init__()
        if self.parallel == "fsdp":
            raise ValueError(
                "parallel is fsdp, expected ddp: fine-tuning sees few tokens of a clip, and needs no shards"
            )
        self.check_positive("eval_every", "layer_decay", "balanced_clips", "mixup_alpha")
        self.check_not_negative("time_mask", "frequency_mask")
        for name in ("drop_path", "mask_ratio_time", "mask_ratio_frequency"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 up to but not 1")
        if not 0 <= self.mixup <= 1:
            raise ValueError(f"mixup is {self.mixup}, expected a probability")
        several = {"audioset": True, "audioset-20k": True, "manifest": self.multi_label}.get(self.dataset, False)
        if self.multi_label != several:
            raise ValueError(f"multi_label is {self.multi_label} with {self.dataset}, expected {several}")
        if self.multi_label and self.loss == "ce":
            raise ValueError("loss is ce with multi_label, expected bce: clips of several classes have no distribution")
        if self.layer_decay > 1:
            raise ValueError(f"layer_decay is {self.layer_decay}, expected at most 1")
        if self.balanced_clips is not None and self.repeats != 1:
            raise ValueError(
                f"repeats is {self.repeats} with balanced_clips, expected 1: that sets what an epoch holds"
            )

    def resized(self, size: str) -> Self:
        """Change the encoder to a published size; ViT-S fine-tunes at higher rates (arXiv 2207.06405)."""
        base_lr = SMALL_BASE_LR.get(self.base_lr, self.base_lr) if size == "small" else self.base_lr
        return replace(super().resized(size), base_lr=base_lr)

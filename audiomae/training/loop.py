"""The pre-training loop."""

import inspect
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from audiomae.data import ClipBatches
from audiomae.frontend import LogMel
from audiomae.grid import PatchGrid
from audiomae.masking import PatchMask
from audiomae.model import AudioMAE
from audiomae.seeding import clip_seed, mask_seeds
from audiomae.training.config import PretrainConfig
from audiomae.training.distributed import Ranks
from audiomae.training.logging import NullLog, RunLog
from audiomae.training.optimizer import cosine_lr

# Buffers are constant. PyTorch 2.13 gave the setting that sends them in every forward a new name.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def uses_bf16(config: PretrainConfig, device: torch.device) -> bool:
    """Whether the model runs under bf16 autocast."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def draw_mask(config: PretrainConfig, grid: PatchGrid, seeds: Tensor, impl: str) -> PatchMask:
    """Draw masks of the kind and ratio of a run.

    Args:
        config: The run.
        grid: The patch grid.
        seeds: ``(B,)`` int64, one a row.
        impl: Form of the operator.

    Raises:
        ValueError: A ratio that keeps or removes nothing.
    """
    if config.mask == "random":
        return PatchMask.random(seeds, grid, config.mask_ratio, impl=impl)
    if config.mask == "time":
        return PatchMask.time(seeds, grid, config.mask_ratio)
    if config.mask == "frequency":
        return PatchMask.frequency(seeds, grid, config.mask_ratio)
    return PatchMask.time_frequency(seeds, grid, config.mask_ratio, config.mask_ratio_frequency)


def check_mask(config: PretrainConfig, grid: PatchGrid) -> None:
    """Raise ValueError if the masks of a run would keep or remove nothing of a grid."""
    draw_mask(config, grid, torch.zeros(1, dtype=torch.int64), impl="reference")


class StepResult(NamedTuple):
    """What a step gives, as scalars on the device.

    Attributes:
        loss: Of this rank's share of the batch.
        baseline_loss: Of predicting each patch's mean; 0 unless asked for.
        gradient_norm: Before clipping; None where nothing is clipped.
    """

    loss: Tensor
    baseline_loss: Tensor
    gradient_norm: Tensor | None


class EpochResult(NamedTuple):
    """Averages over an epoch and all ranks.

    Attributes:
        loss: Of the model, over all steps.
        baseline_loss: Of predicting each patch's mean, over the logged steps.
    """

    loss: float
    baseline_loss: float


class Pretrainer:
    """Trains an :class:`AudioMAE` on batches of waveforms, one rank's share each.

    Args:
        config: The run.
        ranks: This process among the others.
        model: On ``ranks.device``.
        optimizer: Of the model's parameters.
        front_end: Waveforms to spectrograms, on ``ranks.device``.
        batches: Batch sampler of ``loader``.
        loader: Gives micro-batches ``(waveform (B, samples), pairs (B, 2))``.
    """

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks,
        model: AudioMAE,
        optimizer: torch.optim.Optimizer,
        front_end: LogMel,
        batches: ClipBatches,
        loader: DataLoader[Any],
    ):
        self.config, self.ranks, self.model, self.optimizer = config, ranks, model, optimizer
        self.front_end, self.batches, self.loader = front_end, batches, loader
        self.steps_per_epoch = batches.steps
        self.precision = torch.bfloat16 if uses_bf16(config, ranks.device) else torch.float32
        # Both wrappers are called as the model is.
        self.replica: Any = model
        if ranks.world_size > 1:
            options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
            self.replica = DistributedDataParallel(model, **options)
        # Compiled from outside, so that the compiler splits the backward where gradients are reduced.
        self.compiled: Any = torch.compile(self.replica) if config.compile else self.replica

    def run_epoch(self, epoch: int, log: RunLog | NullLog) -> EpochResult:
        """Train for one epoch; nothing waits for the device but logged steps, and the last step is always logged.

        Args:
            epoch: Its number, from 0.
            log: Where logged steps go.

        Raises:
            FloatingPointError: The loss at a logged step is not finite.
        """
        # What the model draws (dropout) depends on the epoch and the rank alone, so that a resumed run draws the same.
        torch.manual_seed(clip_seed(self.config.seed, epoch, self.ranks.rank, "dropout"))
        self.model.train()
        self.batches.set_epoch(epoch)
        epoch_loss = torch.zeros((), device=self.ranks.device)
        recent_loss, recent_steps, recent_start = torch.zeros_like(epoch_loss), 0, time.perf_counter()
        baseline_losses = []
        # The same iterator as often as a batch has micro-batches: zip takes the next one from it each time.
        micro_batches = [iter(self.loader)] * self.config.accumulation
        for index, batch in enumerate(zip(*micro_batches, strict=True)):
            step = epoch * self.steps_per_epoch + index + 1
            logged = step % self.config.log_every == 0 or index + 1 == self.steps_per_epoch
            lr = self._set_learning_rate(step - 1)
            result = self._train_step(batch, with_baseline_loss=logged)
            recent_loss += result.loss
            recent_steps += 1
            if logged:
                averages = self.ranks.mean(torch.stack([recent_loss / recent_steps, result.baseline_loss])).tolist()
                if not math.isfinite(averages[0]):
                    raise FloatingPointError(f"the loss is {averages[0]} at step {step} (epoch {epoch + 1})")
                baseline_losses.append(averages[1])
                clips_per_second = recent_steps * self.config.batch_size / (time.perf_counter() - recent_start)
                norm = result.gradient_norm
                extra = {} if norm is None else {"gradient_norm": float(norm)}
                log.step(
                    step=step,
                    epoch=epoch + 1,
                    loss=averages[0],
                    baseline_loss=averages[1],
                    lr=lr,
                    clips_per_second=clips_per_second,
                    **extra,
                )
                epoch_loss += recent_loss
                recent_loss, recent_steps, recent_start = torch.zeros_like(epoch_loss), 0, time.perf_counter()
            log.advance(step)
        average = self.ranks.mean(epoch_loss / self.steps_per_epoch).item()
        return EpochResult(average, sum(baseline_losses) / len(baseline_losses))

    def _set_learning_rate(self, steps_done: int) -> float:
        lr = cosine_lr(
            steps_done,
            total=self.config.epochs * self.steps_per_epoch,
            warmup=self.config.warmup_epochs * self.steps_per_epoch,
            peak=self.config.peak_lr,
            minimum=self.config.min_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _train_step(self, batch: Sequence[tuple[Tensor, Tensor]], *, with_baseline_loss: bool) -> StepResult:
        """Take an optimiser step on the micro-batches of a batch."""
        count = len(batch)
        loss = torch.zeros((), device=self.ranks.device)
        baseline_loss = torch.zeros_like(loss)
        for micro, (waveform, pairs) in enumerate(batch):
            spec, mask = self.prepare(waveform, pairs)
            # All gradients are reduced once, in the backward of the last micro-batch.
            syncs = micro + 1 == count or self.ranks.world_size == 1
            with nullcontext() if syncs else self.replica.no_sync():
                with torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32):
                    micro_loss = self.compiled(spec, mask).loss / count
                micro_loss.backward()
            loss += micro_loss.detach()
            if with_baseline_loss:
                baseline_loss += self.model.baseline_loss(spec, mask) / count
        norm = None
        if self.config.clip_grad is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss, baseline_loss, norm)

    def prepare(self, waveform: Tensor, pairs: Tensor) -> tuple[Tensor, PatchMask]:
        """Turn waveforms ``(B, samples)`` and their visits ``(B, 2)`` into normalised spectrograms and masks."""
        device = self.ranks.device
        spec = self.front_end(waveform.to(device, non_blocking=True), target_frames=self.model.grid.spec_size[0])
        seeds = mask_seeds(self.config.seed, pairs)
        if device.type == "cuda":  # a copy from pageable memory would wait for the device
            seeds = seeds.pin_memory().to(device, non_blocking=True)
        return spec, draw_mask(self.config, self.model.grid, seeds, self.model.impl)

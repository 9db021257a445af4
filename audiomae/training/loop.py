"""The training loop: what pre-training and fine-tuning have in common."""

import inspect
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from audiomae.data import ClipBatches
from audiomae.seeding import clip_seed
from audiomae.training.compiling import compile_blocks
from audiomae.training.config import RunConfig
from audiomae.training.distributed import Ranks
from audiomae.training.logging import NullLog, RunLog
from audiomae.training.optimizer import cosine_lr, set_lr

# Buffers are constant. PyTorch 2.13 gave the setting that sends them in every forward a new name.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype that a model runs in under ``"bf16"``, ``"fp32"`` or ``"auto"``, which is bf16 on GPUs."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


class EpochResult(NamedTuple):
    """Averages over an epoch and all ranks.

    Attributes:
        loss: Of the model, over all steps.
        scalars: What else was logged, over the logged steps.
    """

    loss: float
    scalars: dict[str, float]


class _Waits:
    """Iterates over a loader and adds up how long its items, the start of its workers included, are waited for.

    Args:
        loader: What to iterate over.

    Attributes:
        seconds: The sum; may be set back.
    """

    def __init__(self, loader: Iterable[Any]):
        self.seconds = 0.0
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        start = time.perf_counter()
        for item in self._loader:
            self.seconds += time.perf_counter() - start
            yield item
            start = time.perf_counter()


class Trainer(ABC):
    """Trains a model on batches, one rank's share each. What the loss of a batch is, subclasses say.

    Args:
        config: The run.
        ranks: This process among the others.
        model: On ``ranks.device``.
        optimizer: Of the model's parameters.
        batches: Batch sampler of ``loader``.
        loader: Gives micro-batches.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: ClipBatches,
        loader: DataLoader[Any],
    ):
        self.config, self.ranks, self.model, self.optimizer = config, ranks, model, optimizer
        self.batches, self.loader = batches, loader
        self.steps_per_epoch = batches.steps
        self.precision = autocast_dtype(config.precision, ranks.device)
        if config.compile:
            compile_blocks(model)
        self.replica: Any = model
        if ranks.world_size > 1:
            options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
            self.replica = DistributedDataParallel(model, **options)

    @abstractmethod
    def compute_loss(self, batch: Any, *, logged: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch through ``self.replica``, and what else is logged of a logged step.

        Args:
            batch: As the loader gives it, on the CPU.
            logged: Whether this step is logged; the others return no more than the loss.
        """

    def set_training_mode(self) -> None:
        """Put the model into training mode."""
        self.model.train()

    def autocast(self) -> torch.autocast:
        """The precision that the model runs in."""
        return torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32)

    def run_epoch(self, epoch: int, log: RunLog | NullLog) -> EpochResult:
        """Train for one epoch; nothing waits for the device but logged steps, and the last step is always logged.

        The share of time that is logged as ``waiting`` is this process's, between logged steps, inside the loader. On a
        GPU it bounds from above how long the device lacked data, for what is queued there goes on meanwhile. Where it
        is another rank that lacks data, this one waits for its gradients instead, and only clips/s tells.

        Args:
            epoch: Its number, from 0.
            log: Where logged steps go.

        Raises:
            FloatingPointError: The loss at a logged step is not finite.
        """
        # What the model draws (dropout) depends on the epoch and the rank alone, so that a resumed run draws the same.
        torch.manual_seed(clip_seed(self.config.seed, epoch, self.ranks.rank, "dropout"))
        self.set_training_mode()
        self.batches.set_epoch(epoch)
        epoch_loss = torch.zeros((), device=self.ranks.device)
        recent_loss, recent_steps, recent_start = torch.zeros_like(epoch_loss), 0, time.perf_counter()
        logged_scalars: list[dict[str, float]] = []
        # The same iterator as often as a batch has micro-batches: zip takes the next one from it each time.
        waits = _Waits(self.loader)
        micro_batches = [iter(waits)] * self.config.accumulation
        for index, batch in enumerate(zip(*micro_batches, strict=True)):
            step = epoch * self.steps_per_epoch + index + 1
            logged = step % self.config.log_every == 0 or index + 1 == self.steps_per_epoch
            lr = self._learning_rate(step - 1)
            set_lr(self.optimizer, lr)
            loss, scalars = self._train_step(batch, logged=logged)
            recent_loss += loss
            recent_steps += 1
            if logged:
                names = list(scalars)
                values = torch.stack([recent_loss / recent_steps, *scalars.values()])
                average, *others = self.ranks.mean(values).tolist()
                if not math.isfinite(average):
                    raise FloatingPointError(f"the loss is {average} at step {step} (epoch {epoch + 1})")
                logged_scalars.append(dict(zip(names, others, strict=True)))
                seconds = time.perf_counter() - recent_start
                log.step(
                    step=step,
                    epoch=epoch + 1,
                    loss=average,
                    lr=lr,
                    clips_per_second=recent_steps * self.config.batch_size / seconds,
                    waiting=waits.seconds / seconds,
                    **logged_scalars[-1],
                )
                epoch_loss += recent_loss
                recent_loss, recent_steps, recent_start = torch.zeros_like(epoch_loss), 0, time.perf_counter()
                waits.seconds = 0.0
            log.advance(step)
        average = self.ranks.mean(epoch_loss / self.steps_per_epoch).item()
        count = len(logged_scalars)
        return EpochResult(average, {k: sum(s[k] for s in logged_scalars) / count for k in logged_scalars[0]})

    def _learning_rate(self, steps_done: int) -> float:
        return cosine_lr(
            steps_done,
            total=self.config.epochs * self.steps_per_epoch,
            warmup=self.config.warmup_epochs * self.steps_per_epoch,
            peak=self.config.peak_lr,
            minimum=self.config.min_lr,
        )

    def _train_step(self, batch: Sequence[Any], *, logged: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Take an optimiser step on the micro-batches of a batch; return the means of what they give."""
        count = len(batch)
        loss = torch.zeros((), device=self.ranks.device)
        scalars: dict[str, Tensor] = {}
        for micro, micro_batch in enumerate(batch):
            # All gradients are reduced once, in the backward of the last micro-batch.
            syncs = micro + 1 == count or self.ranks.world_size == 1
            with nullcontext() if syncs else self.replica.no_sync():
                micro_loss, micro_scalars = self.compute_loss(micro_batch, logged=logged)
                (micro_loss / count).backward()
            loss += micro_loss.detach() / count
            for name, value in micro_scalars.items():
                scalars[name] = scalars.get(name, 0) + value / count
        if self.config.clip_grad is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            if logged:
                scalars["gradient_norm"] = norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, scalars

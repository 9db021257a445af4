"""The training loop: what pre-training and fine-tuning have in common."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from audiomae.data import Batch, ClipBatches, Manifest
from audiomae.seeding import seed_device
from audiomae.training.config import RunConfig, autocast_dtype
from audiomae.training.distributed import Ranks
from audiomae.training.faults import Faults
from audiomae.training.logging import NullLog, RunLog
from audiomae.training.optimizer import cosine_lr, set_lr
from audiomae.training.parallel import syncing, whole
from audiomae.training.progress import EpochResult, Meter, Progress
from audiomae.training.rollcall import COMPUTING
from audiomae.training.signals import Stopped
from audiomae.training.state import Model, State, settings_of
from audiomae.training.supervisor import NullSupervisor, Supervisor
from audiomae.training.verdict import PendingVerdict

WAITING_FOR_DATA = "waiting for data"


class _Paced:
    """Iterates over a loader, and times what is done with its items and how long each is waited for.

    Args:
        loader: What to iterate over.
        step: Steps that were taken before.
    """

    def __init__(self, loader: Iterable[Any], step: int):
        self._loader, self._step = loader, step
        self._start, self._waited = time.perf_counter(), 0.0

    def __iter__(self) -> Iterator[Any]:
        start = time.perf_counter()
        for item in self._loader:
            self._waited += time.perf_counter() - start
            yield item
            start = time.perf_counter()

    def lap(self, step: int) -> tuple[float, float]:
        """Tell the steps a second since the last lap, and the share of the time spent waiting for the loader."""
        now = time.perf_counter()
        seconds = now - self._start
        rates = (step - self._step) / seconds, self._waited / seconds
        self._step, self._start, self._waited = step, now, 0.0
        return rates


class Trainer(ABC):
    """Trains a model on batches, one rank's share each. What the loss of a batch is, subclasses say.

    Args:
        config: The run.
        ranks: This process among the others.
        model: On ``ranks.device``.
        replica: What :func:`audiomae.training.parallel.distribute` made of it.
        optimizer: Of the model's parameters.
        manifest: The clips, to name them.
        batches: Batch sampler of ``loader``.
        loader: Gives micro-batches, each a :class:`audiomae.data.Batch`.
        progress: How far the run is; None is at its beginning.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        model: Model,
        replica: nn.Module,
        optimizer: torch.optim.Optimizer,
        manifest: Manifest,
        batches: ClipBatches,
        loader: Iterable[Batch],
        progress: Progress | None = None,
    ):
        self.config, self.ranks, self.optimizer = config, ranks, optimizer
        self.model, self.replica = model, replica
        self.manifest, self.batches, self.loader = manifest, batches, loader
        self.progress = progress or Progress()
        self.faults = Faults(config, ranks, manifest, batches.steps * batches.batch_size, self.progress)
        self.steps_per_epoch = batches.steps
        self.precision = autocast_dtype(config.precision, ranks.device)

    @abstractmethod
    def compute_loss(self, data: Any, *, logged: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch through ``self.replica``, and what else is logged of a logged step.

        Args:
            data: As the loader gives it, on the CPU.
            logged: Whether this step is logged; the others return no more than the loss.
        """

    @abstractmethod
    def visits(self, data: Any) -> Tensor:
        """Tell the visits of a micro-batch's clips, ``(B, 2)`` int64: epoch and clip of each."""

    def set_training_mode(self) -> None:
        """Put the model into training mode."""
        self.model.train()

    def autocast(self) -> torch.autocast:
        """The precision that the model runs in."""
        return torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32)

    def run_epoch(
        self, epoch: int, log: RunLog | NullLog, supervisor: Supervisor | NullSupervisor | None = None
    ) -> EpochResult:
        """Train for one epoch, or what is left of it; the last step is always logged.

        Nothing waits for the device but logged steps, and each step for the one before it. The share of time that is
        logged as ``waiting`` is this process's, between logged steps, inside the loader. On a GPU it bounds from above
        how long the device lacked data, for what is queued there goes on meanwhile. Where it is another rank that lacks
        data, this one waits for its gradients instead, and only clips/s tells.

        Args:
            epoch: Its number, from 0.
            log: Where logged steps go.
            supervisor: Saves within the epoch, and passes on signals.

        Raises:
            FloatingPointError: More steps than may be left out had a loss or a gradient that is not finite.
            TooManySkippedError: More clips than may be skipped cannot be read.
            Stopped: A signal stopped the run within the epoch; its state is saved.
        """
        supervisor = supervisor or NullSupervisor()
        first = self.progress.step - epoch * self.steps_per_epoch
        if not first:
            self.faults.begin_epoch()
        meter = Meter.restore(self.progress.meter if first else None, self.ranks.device)
        self.set_training_mode()
        self.batches.set_epoch(epoch, first)
        pending: PendingVerdict | None = None
        # The same iterator as often as a batch has micro-batches: zip takes the next one from it each time.
        paced = _Paced(self.loader, self.progress.step)
        micro_batches = [iter(paced)] * self.config.accumulation
        supervisor.mark(self.progress.step, WAITING_FOR_DATA)
        for index, batch in enumerate(zip(*micro_batches, strict=True), start=first):
            step, last = epoch * self.steps_per_epoch + index + 1, index + 1 == self.steps_per_epoch
            supervisor.mark(step, COMPUTING)
            logged = last or step % self.config.log_every == 0
            lr = self._learning_rate(step - 1)
            set_lr(self.optimizer, lr)
            self.faults.meet(step, batch)
            scalars, judged = self._train_step(step, [part.data for part in batch], meter, supervisor, logged=logged)
            stop = self._learn(pending, log, supervisor)
            pending = judged
            self.progress.step = step
            if logged:
                self._log(log, step, lr, meter, scalars, paced)
            log.advance(step)
            if last or stop or supervisor.saves_after(step):
                stop = self._learn(pending, log, supervisor) or stop
                pending = None
            if not last and (stop or supervisor.saves_after(step)):
                self.progress.meter = meter.state(self.ranks)
                self.save(log, supervisor)
                if stop:
                    raise Stopped(stop, step)
            # What comes after the last step, all ranks do together.
            supervisor.mark(step, COMPUTING if last else WAITING_FOR_DATA)
        self.progress.meter = None
        return meter.result(stop)

    def save(self, log: RunLog | NullLog, supervisor: Supervisor | NullSupervisor, *, keep: int | None = None) -> None:
        """Save the state of the run; all ranks take part.

        Args:
            log: Where clips that cannot be read go.
            supervisor: Writes the state.
            keep: Number of an epoch whose state is kept under a name of its own too.
        """
        self.faults.settle(log)
        state = State(
            settings=settings_of(self.config),
            config=self.model.config.to_dict(),
            model=whole(self.model.state_dict(), keep=self.ranks.main),
            optimizer=whole(self.optimizer.state_dict(), keep=self.ranks.main),
            progress=dict(vars(self.progress)),
            steps_per_epoch=self.steps_per_epoch,
            launch=supervisor.launch,
            clips=self.manifest.fingerprint(),
        )
        supervisor.save(state, self.model, keep=keep)

    def _learn(
        self, pending: PendingVerdict | None, log: RunLog | NullLog, supervisor: Supervisor | NullSupervisor
    ) -> int:
        """Learn what a step was; return the number of the signal that asked any rank to stop by then, or 0."""
        if pending is None:
            return 0
        verdict = pending.wait()
        self.faults.judge(verdict, log, supervisor)
        return verdict.stop

    def _log(
        self, log: RunLog | NullLog, step: int, lr: float, meter: Meter, scalars: dict[str, Tensor], paced: _Paced
    ) -> None:
        """Log a step; all ranks take part."""
        loss, *others = self.ranks.mean(torch.stack([meter.recent(), *scalars.values()])).tolist()
        averages = dict(zip(scalars, others, strict=True))
        meter.log(loss, averages)
        self.faults.settle(log)
        steps_per_second, waiting = paced.lap(step)
        log.step(
            step=step,
            epoch=(step - 1) // self.steps_per_epoch + 1,
            loss=loss,
            lr=lr,
            clips_per_second=steps_per_second * self.config.batch_size,
            waiting=waiting,
            skipped=len(self.progress.unread),
            **averages,
        )

    def _learning_rate(self, steps_done: int) -> float:
        return cosine_lr(
            steps_done,
            total=self.config.epochs * self.steps_per_epoch,
            warmup=self.config.warmup_epochs * self.steps_per_epoch,
            peak=self.config.peak_lr,
            minimum=self.config.min_lr,
        )

    def _train_step(
        self, step: int, batch: Sequence[Any], meter: Meter, supervisor: Supervisor | NullSupervisor, *, logged: bool
    ) -> tuple[dict[str, Tensor], PendingVerdict]:
        """Take an optimiser step on the micro-batches of a batch; return what else they give, and the verdict on it."""
        visits = [self.visits(data) for data in batch]
        losses: list[Tensor] = []
        total = torch.zeros((), device=self.ranks.device)
        scalars: dict[str, Tensor] = {}
        for micro, data in enumerate(batch):
            # The mean over ranks of the sums over micro-batches is then the mean over clips, also of unequal shares.
            weight = len(visits[micro]) * self.ranks.world_size / self.config.batch_size
            # All gradients are reduced once, in the backward of the last micro-batch.
            with syncing(self.replica, micro + 1 == len(batch)):
                seed_device(self.ranks.device, self.config.seed, step)
                loss, others = self.compute_loss(data, logged=logged)
                # A loss that is not finite makes the whole gradient so, and with it that of every other rank.
                (loss * torch.where(loss.detach().isfinite(), weight, math.nan)).backward()
            losses.append(loss.detach())
            total += losses[-1] * weight
            for name, value in others.items():
                scalars[name] = scalars.get(name, 0) + value * weight
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = norm.isfinite()
        if self.config.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
        # The optimiser's own switch, made for gradient scalers: nothing changes in a step where it is not 0.
        self.optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        meter.add(total, finite)
        if logged:
            scalars["gradient_norm"] = norm
        return scalars, PendingVerdict(step, finite, torch.stack(losses), visits, supervisor.stop, self.ranks)

"""Pre-training: masks, and the loss of a batch of waveforms."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from audiomae.data import Batch, ClipBatches, Manifest
from audiomae.frontend import LogMel
from audiomae.grid import PatchGrid
from audiomae.masking import PatchMask
from audiomae.model import AudioMAE
from audiomae.seeding import visit_seeds
from audiomae.training.config import PretrainConfig
from audiomae.training.distributed import Ranks
from audiomae.training.loop import Trainer
from audiomae.training.progress import Progress


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


class Pretrainer(Trainer):
    """Trains an :class:`AudioMAE` on batches of waveforms; besides the loss it logs that of each patch's mean.

    Args:
        config: The run.
        ranks: This process among the others.
        model: On ``ranks.device``.
        replica: What :func:`audiomae.training.parallel.distribute` made of it.
        optimizer: Of the model's parameters.
        front_end: Waveforms to spectrograms, on ``ranks.device``.
        manifest: The clips, to name them.
        batches: Batch sampler of ``loader``.
        loader: Gives micro-batches of ``(waveform (B, samples), pairs (B, 2))``.
        progress: How far the run is; None is at its beginning.
    """

    config: PretrainConfig
    model: AudioMAE

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks,
        model: AudioMAE,
        replica: nn.Module,
        optimizer: torch.optim.Optimizer,
        front_end: LogMel,
        manifest: Manifest,
        batches: ClipBatches,
        loader: Iterable[Batch],
        progress: Progress | None = None,
    ):
        super().__init__(config, ranks, model, replica, optimizer, manifest, batches, loader, progress)
        self.front_end = front_end

    def visits(self, data: tuple[Tensor, Tensor]) -> Tensor:
        """Tell the visits of a micro-batch's clips, ``(B, 2)`` int64."""
        return data[1]

    def compute_loss(self, data: tuple[Tensor, Tensor], *, logged: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the reconstruction loss of a micro-batch."""
        spec, mask = self.prepare(*data)
        with self.autocast():
            loss = self.replica(spec, mask).loss
        return loss, {"baseline_loss": self.model.baseline_loss(spec, mask)} if logged else {}

    def prepare(self, waveform: Tensor, pairs: Tensor) -> tuple[Tensor, PatchMask]:
        """Turn waveforms ``(B, samples)`` and their visits ``(B, 2)`` into normalised spectrograms and masks."""
        device = self.ranks.device
        spec = self.front_end(waveform.to(device, non_blocking=True), target_frames=self.model.grid.spec_size[0])
        seeds = self.ranks.send(visit_seeds(self.config.seed, pairs, "mask"))
        return spec, draw_mask(self.config, self.model.grid, seeds, self.model.impl)

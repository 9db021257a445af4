"""Fine-tuning: spectrograms, masks and the loss of a batch of labelled clips; scores of clips for evaluation."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from audiomae.classifier import AudioClassifier
from audiomae.data import Batch, ClipBatches, Manifest
from audiomae.data.labelled import Example
from audiomae.frontend import LogMel
from audiomae.grid import PatchGrid
from audiomae.masking import PatchMask
from audiomae.seeding import visit_seeds
from audiomae.training.config import FinetuneConfig
from audiomae.training.distributed import Ranks
from audiomae.training.loop import Trainer
from audiomae.training.progress import Progress


def draw_mask(config: FinetuneConfig, grid: PatchGrid, seeds: Tensor) -> PatchMask | None:
    """Draw which patches a training step drops; None where it drops none.

    Args:
        config: The run.
        grid: The patch grid.
        seeds: ``(B,)`` int64, one a row.

    Raises:
        ValueError: A ratio that keeps or removes nothing.
    """
    time, frequency = config.mask_ratio_time, config.mask_ratio_frequency
    if config.freeze or not (time or frequency):
        return None
    if not frequency:
        return PatchMask.time(seeds, grid, time)
    if not time:
        return PatchMask.frequency(seeds, grid, frequency)
    return PatchMask.time_frequency(seeds, grid, time, frequency)


def prepare(example: Example, front_end: LogMel, ranks: Ranks) -> Tensor:
    """Turn a batch into normalised spectrograms on the device, with 0 in log-mel units where SpecAugment removes."""
    frames = example.keep_frames.shape[1]
    spec = front_end(ranks.send(example.waveform), target_frames=frames, lengths=example.length)
    keep = ranks.send(example.keep_frames)[:, None, :, None] & ranks.send(example.keep_mels)[:, None, None, :]
    return spec.where(keep, front_end.padding)


class Finetuner(Trainer):
    """Trains an :class:`AudioClassifier` on batches of labelled clips.

    Args:
        config: The run. With ``freeze``, the encoder stays as it is and sees all patches.
        ranks: This process among the others.
        model: On ``ranks.device``.
        replica: What :func:`audiomae.training.parallel.distribute` made of it.
        optimizer: Of the model's trainable parameters.
        front_end: Waveforms to spectrograms, on ``ranks.device``.
        manifest: The clips, to name them.
        batches: Batch sampler of ``loader``.
        loader: Gives micro-batches of :class:`audiomae.data.labelled.Example`.
        progress: How far the run is; None is at its beginning.
    """

    config: FinetuneConfig
    model: AudioClassifier

    def __init__(
        self,
        config: FinetuneConfig,
        ranks: Ranks,
        model: AudioClassifier,
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

    def visits(self, data: Example) -> Tensor:
        """Tell the visits of a micro-batch's clips, ``(B, 2)`` int64."""
        return data.pair

    def compute_loss(self, data: Example, *, logged: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the classification loss of a micro-batch."""
        seeds, drop_path_seeds = (
            self.ranks.send(visit_seeds(self.config.seed, data.pair, purpose)) for purpose in ("mask", "drop path")
        )
        spec = prepare(data, self.front_end, self.ranks)
        mask = draw_mask(self.config, self.model.grid, seeds)
        with self.autocast():
            logits = self.replica(spec, mask, drop_path_seeds)
        target = self.ranks.send(data.target)
        if self.config.loss == "bce":
            return F.binary_cross_entropy_with_logits(logits.float(), target), {}
        return F.cross_entropy(logits.float(), target), {}


class ClipScores(NamedTuple):
    """Scores of all clips of a split that can be read, in its order, on every rank.

    Attributes:
        scores: ``(N, classes)`` float32, probabilities.
        targets: ``(N, classes)`` bool.
        unread: Numbers of the clips that cannot be read, which have no scores, and what is wrong with each.
    """

    scores: np.ndarray
    targets: np.ndarray
    unread: dict[int, str]


@torch.no_grad()
def score_clips(
    model: AudioClassifier,
    front_end: LogMel,
    loader: DataLoader[Any],
    ranks: Ranks,
    precision: torch.dtype = torch.float32,
    on_batch: Callable[[], None] = lambda: None,
    on_wait: Callable[[], None] = lambda: None,
) -> ClipScores:
    """Score every clip of a split once, over all ranks.

    Args:
        model: In evaluation mode while this runs, and left as it was.
        front_end: Waveforms to spectrograms, on the model's device.
        loader: Batches of :class:`audiomae.data.labelled.Example` of this rank's share, as
            :class:`audiomae.data.sampling.EvaluationBatches` draws it. What replaces clips that cannot be read is left
            out.
        ranks: This process among the others.
        precision: Of autocast; float32 is none.
        on_batch: Called after each batch.
        on_wait: Called before ranks wait for each other.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    clips, owns, scores, targets, unread = [], [], [], [], {}
    try:
        for batch, unread_here in loader:
            spec = prepare(batch, front_end, ranks)
            with torch.autocast(ranks.device.type, precision, enabled=precision != torch.float32):
                logits = model(spec)
            visit, clip = batch.pair.T
            owns.append(visit >= 0)
            clips.append(clip.clone())  # a view would keep the shared memory of its worker open
            scores.append(model.scores(logits))
            targets.append(batch.target.bool())
            unread.update(unread_here)
            on_batch()
    finally:
        for module, training in modes:
            module.training = training
    classes = model.config.num_classes
    own = torch.cat(owns).numpy() if owns else np.zeros(0, dtype=bool)
    share = (
        torch.cat(clips).numpy()[own] if clips else np.zeros(0, dtype=np.int64),
        torch.cat(scores).cpu().numpy()[own] if scores else np.zeros((0, classes), dtype=np.float32),
        torch.cat(targets).numpy()[own] if targets else np.zeros((0, classes), dtype=bool),
    )
    on_wait()
    *shares, all_unread = zip(*ranks.gather((*share, unread)), strict=True)
    all_clips, all_scores, all_targets = map(np.concatenate, shares)
    order = np.argsort(all_clips)
    # A clip that was drawn as a replacement and failed there alone has its scores.
    scored = set(all_clips.tolist())
    merged = dict(sorted(item for of_rank in all_unread for item in of_rank.items() if item[0] not in scored))
    return ClipScores(all_scores[order], all_targets[order], merged)

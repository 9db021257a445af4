"""Pre-train Audio-MAE.

    python -m audiomae.pretrain                                        # the demo clips, on whatever device is there
    python -m audiomae.pretrain --recipe pretrain-audioset --data audioset.json
    torchrun --nproc-per-node 8 -m audiomae.pretrain --recipe pretrain-audioset --data audioset.json --fused

--recipe NAME gives the settings, with --variant and --size; every other flag changes one of them. The output folder
gets log.jsonl, TensorBoard files, pictures of reconstructions, checkpoints, and the weights as safetensors.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from mae_kernels.ops import resolve_forms
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, default_collate

from audiomae.checkpoints import start_encoder
from audiomae.data import ClipBatches, ClipDataset, read_manifest
from audiomae.frontend import LogMel
from audiomae.model import AudioMAE
from audiomae.recipes import PRETRAIN_RECIPES
from audiomae.training.config import PretrainConfig
from audiomae.training.distributed import Ranks, is_main_process, join_ranks
from audiomae.training.logging import NullLog, RunLog
from audiomae.training.loop import Pretrainer, draw_mask, uses_bf16
from audiomae.training.optimizer import build_adamw
from audiomae.training.pictures import reconstruction_examples
from audiomae.training.state import find_checkpoint, load_state, save_state


def parse_arguments(arguments: Sequence[str] | None = None) -> PretrainConfig:
    """Read the command line: a first pass finds the recipe, a second one the flags over it.

    Raises:
        ValueError: An unknown recipe or size, or a setting out of range.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="demo")
    first.add_argument("--variant", default="paper")
    first.add_argument("--size")
    chosen, _ = first.parse_known_args(arguments)
    if chosen.recipe not in PRETRAIN_RECIPES:
        raise ValueError(f"recipe is {chosen.recipe!r}, expected one of {', '.join(PRETRAIN_RECIPES)}")
    config = PRETRAIN_RECIPES[chosen.recipe](chosen.variant)
    if chosen.size is not None:
        config = replace(config, size=chosen.size, model=config.model.resized(chosen.size))
    return tyro.cli(
        PretrainConfig,
        default=config,
        args=arguments,
        prog="python -m audiomae.pretrain",
        description=__doc__,
        console_outputs=is_main_process(),
    )


def share_processors(config: PretrainConfig, ranks: Ranks) -> int:
    """Divide this rank's processors between reading and, on a CPU, computing; return the number of reading workers.

    A compute thread for every processor besides a reading worker would be one too many: OpenMP's threads wait for
    each other many times a step, and one that is not running holds up the rest. Two threads on two processors of
    which another process takes one train the demo at 7 clips/s, a single thread at 61.
    """
    processors = max(len(os.sched_getaffinity(0)) // ranks.local_world_size, 1)
    if ranks.device.type == "cuda":
        return min(max(processors - 1, 1), 8) if config.workers is None else config.workers
    workers = min(processors - 1, 1) if config.workers is None else config.workers
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(processors - workers, 1))
    return workers


@dataclass(frozen=True)
class Run:
    """Everything that a run needs.

    Attributes:
        dataset: The clips.
        trainer: Trains on them.
        epochs_done: Epochs behind a resumed run.
        notes: Lines that tell what the run is.
    """

    dataset: ClipDataset
    trainer: Pretrainer
    epochs_done: int
    notes: list[str]


def build(config: PretrainConfig, ranks: Ranks) -> Run:
    """Make everything that a run needs, so that whatever is wrong with its settings is found before any work.

    Raises:
        ValueError: Settings that do not go together, or a checkpoint that does not fit.
        OSError: A file or folder that is missing or cannot be read.
    """
    checkpoint = find_checkpoint(config)
    manifest = read_manifest(config.data)
    batches = ClipBatches(
        len(manifest), config.batch_size, config.seed, config.repeats, rank=ranks.rank, world_size=ranks.world_size
    )
    share = config.batch_size // ranks.world_size
    if share % config.accumulation:
        raise ValueError(f"accumulation is {config.accumulation}, expected a divisor of the {share} clips of a rank")

    torch.manual_seed(config.seed)
    model = AudioMAE(config.model, impl="auto" if config.fused else "reference")
    draw_mask(config, model.grid, torch.zeros(1, dtype=torch.int64))
    notes = [] if config.init_from is None else start_encoder(model.encoder, config.init_from)
    model.to(ranks.device)
    optimizer = build_adamw(
        model, lr=config.peak_lr, weight_decay=config.weight_decay, betas=config.betas, device=ranks.device
    )
    epochs_done = 0
    if checkpoint is not None:
        epochs_done = load_state(checkpoint, model, optimizer)
        notes.append(f"resumed from {checkpoint}: {epochs_done} of {config.epochs} epochs are done")

    frames, num_mels = config.model.spec_size
    front_end = LogMel(config.sample_rate, num_mels, mean=config.mean, std=config.std).to(ranks.device)
    samples = front_end.num_samples(frames)
    if config.clip_seconds is not None:
        samples = min(samples, round(config.clip_seconds * config.sample_rate))
    dataset = ClipDataset(
        manifest, config.sample_rate, samples, seed=config.seed, gain=config.gain, gain_db=config.gain_db
    )
    workers = share_processors(config, ranks)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=ranks.device.type == "cuda",
    )
    notes = [
        f"recipe {config.recipe} ({config.variant}): {len(manifest)} clips, {config.epochs} epochs of "
        f"{len(batches)} steps of {config.batch_size} crops of {samples / config.sample_rate:.4g} s",
        f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.model.decoder} decoder, "
        f"{'bf16' if uses_bf16(config, ranks.device) else 'fp32'} on {ranks.world_size} x {ranks.device.type}",
        *describe_operators(config, ranks),
        *notes,
    ]
    return Run(dataset, Pretrainer(config, ranks, model, optimizer, front_end, batches, loader), epochs_done, notes)


def describe_operators(config: PretrainConfig, ranks: Ranks) -> list[str]:
    """Tell which form each operator takes."""
    if not config.fused:
        return ["operators: reference (plain PyTorch); --fused takes the fastest form at hand"]
    dtype = torch.bfloat16 if uses_bf16(config, ranks.device) else torch.float32
    forms = resolve_forms("auto", ranks.device.type, dtype)
    return [f"operator {name}: {form}" for name, form in forms.items()]


def draw_examples(config: PretrainConfig, run: Run, count: int = 4) -> Figure:
    """Draw reconstructions of clips spread over the data, the same crops and masks at every call."""
    trainer = run.trainer
    clips = sorted({index * len(run.dataset) // count for index in range(count)})
    waveform, pairs = default_collate([run.dataset[0, clip] for clip in clips])
    spec, mask = trainer.prepare(waveform, pairs)
    return reconstruction_examples(
        trainer.model,
        spec,
        mask,
        mean=config.mean,
        std=config.std,
        names=[Path(run.dataset.manifest.path(clip)).stem for clip in clips],
        sample_rate=config.sample_rate,
    )


def train(config: PretrainConfig, ranks: Ranks, run: Run, log: RunLog | NullLog) -> None:
    """Train all epochs that are left, with pictures and checkpoints between them."""
    trainer, steps = run.trainer, run.trainer.steps_per_epoch
    for note in run.notes:
        log.message(note)
    log.start(
        total_steps=config.epochs * steps,
        first_step=run.epochs_done * steps,
        steps_per_epoch=steps,
        epochs=config.epochs,
    )
    result = None
    for epoch in range(run.epochs_done + 1, config.epochs + 1):
        result = trainer.run_epoch(epoch - 1, log)
        last = epoch == config.epochs
        if ranks.main and config.picture_every and (last or epoch % config.picture_every == 0):
            log.picture("reconstruction", draw_examples(config, run), epoch * steps)
        if ranks.main and (last or epoch % config.save_every == 0):
            save_state(config, trainer.model, trainer.optimizer, epoch)
    ranks.barrier()
    if result is None:
        log.message(f"nothing to do: all {config.epochs} epochs are done")
    else:
        log.message(
            f"loss over the last epoch: {result.loss:.4f}; the mean of every patch scores {result.mean_loss:.4f}\n"
            f"weights, log, pictures and checkpoint are in {config.output_dir}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is wrong with settings, data or checkpoints ends it with one line and exit status 2."""
    try:
        config = parse_arguments(arguments)
        with join_ranks(config.device) as ranks:
            run = build(config, ranks)
            with RunLog(config.output_dir) if ranks.main else NullLog() as log:
                train(config, ranks, run, log)
    except (ValueError, OSError, FloatingPointError) as error:
        if is_main_process():
            print(f"audiomae.pretrain: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

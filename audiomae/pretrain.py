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
from typing import NoReturn

import torch
import tyro
from mae_kernels.ops import flash_attention, resolve_forms
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, default_collate

from audiomae.checkpoints import start_encoder
from audiomae.data import ClipBatches, ClipDataset, ClipError, read_manifest
from audiomae.model import AudioMAE
from audiomae.recipes import PRETRAIN_RECIPES
from audiomae.training.config import PretrainConfig, SetupError
from audiomae.training.distributed import Ranks, is_main_process, join_ranks
from audiomae.training.logging import NullLog, RunLog
from audiomae.training.loop import Pretrainer, check_mask, draw_mask, uses_bf16
from audiomae.training.optimizer import build_adamw
from audiomae.training.pictures import reconstruction_examples
from audiomae.training.state import find_checkpoint, load_state, save_settings, save_state


def parse_arguments(arguments: Sequence[str] | None = None) -> PretrainConfig:
    """Read the command line: a first pass finds the recipe, a second one the flags over it.

    Raises:
        SetupError: An unknown recipe, variant or size.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="demo")
    first.add_argument("--variant", default="paper")
    first.add_argument("--size")
    chosen, _ = first.parse_known_args(arguments)
    if chosen.recipe not in PRETRAIN_RECIPES:
        raise SetupError(f"recipe is {chosen.recipe!r}, expected one of {', '.join(PRETRAIN_RECIPES)}")
    try:
        config = PRETRAIN_RECIPES[chosen.recipe](chosen.variant)
        if chosen.size is not None:
            config = replace(config, size=chosen.size, model=config.model.resized(chosen.size))
    except ValueError as error:
        raise SetupError(str(error)) from error
    return tyro.cli(
        PretrainConfig,
        default=config,
        args=arguments,
        prog="python -m audiomae.pretrain",
        description=__doc__,
        console_outputs=is_main_process(),
    )


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


def build_together(config: PretrainConfig, ranks: Ranks) -> Run:
    """Build a run on every rank. What is wrong on one of them, which may be on another machine, stops all.

    Raises:
        SetupError: What any rank found to be wrong, or ranks that go on from different epochs.
    """
    run, error = None, None
    try:
        run = build(config, ranks)
    except (ValueError, OSError) as caught:
        error = str(caught)
    errors = dict.fromkeys(text for text in ranks.gather(error) if text is not None)
    if run is None or errors:
        raise SetupError("; ".join(errors))
    epochs = ranks.gather(run.epochs_done)
    if len(set(epochs)) > 1:
        raise SetupError(f"ranks go on from epochs {epochs}: expected one output folder that all machines share")
    return run


def build(config: PretrainConfig, ranks: Ranks) -> Run:
    """Make everything that a run needs, so that whatever is wrong with its settings is found before any work.

    Raises:
        ValueError: Settings that do not go together, or a checkpoint that does not fit.
        OSError: A file or folder that is missing or cannot be read.
    """
    checkpoint = find_checkpoint(config)
    manifest = read_manifest(config.data)
    batches = ClipBatches(
        len(manifest),
        config.batch_size,
        config.seed,
        config.repeats,
        rank=ranks.rank,
        world_size=ranks.world_size,
        splits=config.accumulation,
    )

    torch.manual_seed(config.seed)
    model = AudioMAE(config.model, impl="auto" if config.fused else "reference")
    check_mask(config, model.grid)
    notes = []
    if config.init_from is not None:
        notes = [f"encoder starts from {config.init_from}", *start_encoder(model.encoder, config.init_from)]
    model.to(ranks.device)
    optimizer = build_adamw(model, lr=config.peak_lr, weight_decay=config.weight_decay, betas=config.betas)
    epochs_done = 0
    if checkpoint is not None:
        epochs_done, changes = load_state(checkpoint, config, model, optimizer, steps_per_epoch=batches.steps)
        notes += [f"resumed from {checkpoint}, after epoch {epochs_done}", *changes]

    frames, sample_rate = config.model.spec_size[0], config.model.sample_rate
    front_end = config.model.front_end().to(ranks.device)
    samples = front_end.num_samples(frames)
    if config.clip_seconds is not None:
        if config.clip_seconds * sample_rate > samples:
            raise ValueError(
                f"clip_seconds is {config.clip_seconds}, expected at most the {samples / sample_rate:.4g} s of "
                f"{frames} frames: model.spec-size sets how many there are"
            )
        samples = round(config.clip_seconds * sample_rate)
    if front_end.num_frames(samples) < config.model.patch_size[0]:
        raise ValueError(
            f"clip_seconds is {config.clip_seconds}: {front_end.num_frames(samples)} frames, "
            f"expected at least the {config.model.patch_size[0]} of a patch"
        )
    dataset = ClipDataset(
        manifest,
        sample_rate,
        samples,
        seed=config.seed,
        gain=config.gain,
        gain_db=config.gain_db,
        crop=config.crop,
    )
    workers = share_processors(config, ranks)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=ranks.device.type == "cuda",
        # Workers draw nothing from it, but starting them would take a number from the generator that dropout uses.
        generator=torch.Generator(),
    )
    trainer = Pretrainer(config, ranks, model, optimizer, front_end, batches, loader)
    return Run(dataset, trainer, epochs_done, [*describe(config, ranks, dataset, trainer), *notes])


def share_processors(config: PretrainConfig, ranks: Ranks) -> int:
    """Divide this rank's processors between reading and, on a CPU, computing; return the number of reading workers.

    A compute thread for every processor besides a reading worker would be one too many: OpenMP's threads wait for each
    other many times a step, and one that is not running holds up the rest. Two threads on two processors of which
    another process takes one train the demo at 7 clips/s, a single thread at 61.
    """
    processors = max(len(os.sched_getaffinity(0)) // ranks.local_world_size, 1)
    if ranks.device.type == "cuda":
        return min(max(processors - 1, 1), 8) if config.workers is None else config.workers
    workers = min(processors - 1, 1) if config.workers is None else config.workers
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(processors - workers, 1))
    return workers


def describe(config: PretrainConfig, ranks: Ranks, dataset: ClipDataset, trainer: Pretrainer) -> list[str]:
    """Tell what a run is."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return [
        f"recipe {config.recipe} ({config.variant}): {len(dataset)} clips x {config.repeats}, "
        f"{config.epochs} epochs of {trainer.steps_per_epoch} steps of {config.batch_size} crops "
        f"of {dataset.samples / dataset.sample_rate:.4g} s",
        f"model: {parameters / 1e6:.1f} M parameters, {config.model.decoder} decoder, "
        f"{'bf16' if uses_bf16(config, ranks.device) else 'fp32'} on {ranks.world_size} x {ranks.device.type}",
        *describe_operators(config, ranks, trainer.model),
    ]


def describe_operators(config: PretrainConfig, ranks: Ranks, model: AudioMAE) -> list[str]:
    """Tell which form each operator takes and why."""
    if not config.fused:
        return ["operators: reference (plain PyTorch); --fused takes the fastest form at hand"]
    dtype = torch.bfloat16 if uses_bf16(config, ranks.device) else torch.float32
    forms = resolve_forms(model.impl, ranks.device.type, dtype)
    lines = [f"operator {name}: {form} ({why})" for name, (form, why) in forms.items() if name != "flash_attention"]
    kept = draw_mask(config, model.grid, torch.zeros(1, dtype=torch.int64), model.impl).ids_keep.shape[1]
    attentions = [(1 + kept, model.config.embed_dim // model.config.num_heads)]
    if model.config.decoder != "local":
        tokens = model.grid.num_patches + int(model.config.decoder == "global")
        attentions.append((tokens, model.config.decoder_dim // model.config.decoder_heads))
    return lines + [f"operator {flash_attention.describe(ranks.device, dtype, *sizes)}" for sizes in attentions]


def draw_examples(run: Run, count: int = 4) -> Figure:
    """Draw reconstructions of clips spread over the data, the same crops and masks at every call."""
    trainer = run.trainer
    clips = sorted({index * len(run.dataset) // count for index in range(count)})
    waveform, pairs = default_collate([run.dataset[0, clip] for clip in clips])
    spec, mask = trainer.prepare(waveform, pairs)
    names = [Path(run.dataset.manifest.path(clip)).stem for clip in clips]
    return reconstruction_examples(trainer.model, trainer.front_end, spec, mask, names=names)


def train(config: PretrainConfig, ranks: Ranks, run: Run, log: RunLog | NullLog) -> None:
    """Train all epochs that are left, with pictures and checkpoints between them."""
    trainer, steps = run.trainer, run.trainer.steps_per_epoch
    for note in run.notes:
        log.message(note)
    if run.epochs_done >= config.epochs:
        log.message(f"nothing to do: the {config.epochs} epochs of the run are done")
        return
    if ranks.main:
        save_settings(config)
    log.start(
        total_steps=config.epochs * steps,
        first_step=run.epochs_done * steps,
        steps_per_epoch=steps,
        epochs=config.epochs,
    )
    for epoch in range(run.epochs_done + 1, config.epochs + 1):
        result = trainer.run_epoch(epoch - 1, log)
        last = epoch == config.epochs
        if ranks.main and (last or epoch % config.save_every == 0):
            save_state(config, trainer.model, trainer.optimizer, epochs_done=epoch, steps_per_epoch=steps)
        if ranks.main and config.picture_every and (last or epoch % config.picture_every == 0):
            log.picture("reconstruction", draw_examples(run), epoch * steps)
        if last:
            log.message(
                f"loss over the last epoch: {result.loss:.4f}; "
                f"the mean of every patch scores {result.baseline_loss:.4f}\n"
                f"weights, log, pictures and checkpoint are in {config.output_dir}"
            )
    ranks.barrier()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is wrong with settings, data or checkpoints ends it with one line and exit status 2."""
    try:
        config = parse_arguments(arguments)
        with join_ranks(config.device) as ranks:
            run = build_together(config, ranks)
            try:
                with RunLog(config.output_dir) if ranks.main else NullLog() as log:
                    train(config, ranks, run, log)
            except (OSError, FloatingPointError) as error:
                end_rank(ranks, error)
    except SetupError as error:  # the same on all ranks
        if is_main_process():
            print(f"audiomae.pretrain: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_main_process():
            print("audiomae.pretrain: interrupted; --resume auto goes on after the last saved epoch", file=sys.stderr)
        sys.exit(130)


def end_rank(ranks: Ranks, error: Exception) -> NoReturn:
    """Tell what ended this rank, and exit."""
    # An error of a reading worker carries its traceback as text; the last line is the error itself.
    reason = str(error).strip().splitlines()[-1].removeprefix(f"{ClipError.__module__}.{ClipError.__qualname__}: ")
    where = f" (rank {ranks.rank})" if ranks.world_size > 1 else ""
    print(f"audiomae.pretrain: error{where}: {reason}", file=sys.stderr, flush=True)
    if ranks.world_size > 1:
        os._exit(2)  # an orderly exit could wait for the other ranks, which wait for this one
    sys.exit(2)


if __name__ == "__main__":
    main()

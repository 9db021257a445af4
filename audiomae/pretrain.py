"""Pre-train Audio-MAE.

    python -m audiomae.pretrain                                        # the demo clips, on whatever device is there
    python -m audiomae.pretrain --recipe pretrain-audioset --data audioset.json
    torchrun --nproc-per-node 8 -m audiomae.pretrain --recipe pretrain-audioset --data audioset.json --fused

--recipe NAME gives the settings, with --variant and --size; every other flag changes one of them. The output folder
gets log.jsonl, TensorBoard files, pictures of reconstructions, checkpoints, and the weights as safetensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from mae_kernels.ops import flash_attention, resolve_forms
from matplotlib.figure import Figure

from audiomae.checkpoints import start_encoder
from audiomae.data import ClipBatches, ClipDataset, Replacing, collate_visits, read_manifest
from audiomae.model import AudioMAE
from audiomae.recipes import PRETRAIN_RECIPES
from audiomae.training.command import (
    agree,
    agree_on_step,
    agree_so_far,
    make_training_loader,
    parse_run,
    run_command,
    share_processors,
)
from audiomae.training.config import PretrainConfig, autocast_dtype
from audiomae.training.distributed import Ranks, join_ranks
from audiomae.training.ending import carry_out
from audiomae.training.logging import NullLog, RunLog
from audiomae.training.optimizer import build_adamw
from audiomae.training.parallel import distribute
from audiomae.training.pictures import reconstruction_examples
from audiomae.training.pretrainer import Pretrainer, check_mask, draw_mask
from audiomae.training.progress import Progress
from audiomae.training.signals import Stopped
from audiomae.training.state import Resumed, find_checkpoints, resume, resume_optimizer
from audiomae.training.supervisor import Supervisor

PROG = "audiomae.pretrain"


def parse_arguments(arguments: Sequence[str] | None = None) -> PretrainConfig:
    """Read the command line.

    Raises:
        SetupError: An unknown recipe, variant or size.
    """
    return parse_run(PretrainConfig, PRETRAIN_RECIPES, arguments, prog=f"python -m {PROG}", description=__doc__)


@dataclass(frozen=True)
class Run:
    """Everything that a run needs.

    Attributes:
        clips: What is trained on.
        trainer: Trains on them.
        resumed: Where the run goes on; None for a new one.
        notes: Lines that tell what the run is.
    """

    clips: Replacing
    trainer: Pretrainer
    resumed: Resumed | None
    notes: list[str]


def build(config: PretrainConfig, ranks: Ranks) -> Run:
    """Make everything that a run needs, so that whatever is wrong with its settings is found before any work.

    Raises:
        ValueError: Settings that do not go together, or a checkpoint that does not fit.
        OSError: A file or folder that is missing or cannot be read.
    """
    config.check_stats()
    checkpoints = find_checkpoints(config)
    manifest = read_manifest(config.data, allow_outside=config.allow_outside)
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
    resumed, progress = None, Progress()
    if checkpoints:
        resumed = resume(
            checkpoints, config, model, manifest, steps_per_epoch=batches.steps, world_size=ranks.world_size
        )
        progress = resumed.progress
        notes += resumed.notes
    agree_so_far(ranks)
    replica = distribute(model, config, ranks)
    optimizer = build_adamw(model, lr=config.peak_lr, weight_decay=config.weight_decay, betas=config.betas)
    if resumed is not None:
        resume_optimizer(optimizer, resumed)

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
    clips = Replacing(dataset, config.seed)
    workers = share_processors(config.workers, ranks)
    loader = make_training_loader(clips, samples, batches, ranks, workers)
    trainer = Pretrainer(config, ranks, model, replica, optimizer, front_end, manifest, batches, loader, progress)
    return Run(clips, trainer, resumed, [*describe(config, ranks, dataset, trainer), *notes])


def describe(config: PretrainConfig, ranks: Ranks, dataset: ClipDataset, trainer: Pretrainer) -> list[str]:
    """Tell what a run is."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return [
        f"recipe {config.recipe} ({config.variant}): {len(dataset)} clips x {config.repeats}, "
        f"{config.epochs} epochs of {trainer.steps_per_epoch} steps of {config.batch_size} crops "
        f"of {dataset.samples / dataset.sample_rate:.4g} s",
        f"model: {parameters / 1e6:.1f} M parameters, {config.model.decoder} decoder, "
        f"{'bf16' if trainer.precision == torch.bfloat16 else 'fp32'} on {ranks.world_size} x {ranks.device.type}",
        *describe_operators(config, ranks, trainer.model),
    ]


def describe_operators(config: PretrainConfig, ranks: Ranks, model: AudioMAE) -> list[str]:
    """Tell which form each operator takes and why."""
    if not config.fused:
        return ["operators: reference (plain PyTorch); --fused takes the fastest form at hand"]
    dtype = autocast_dtype(config.precision, ranks.device)
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
    trainer, manifest = run.trainer, run.clips.dataset.manifest
    clips = sorted({index * len(run.clips) // count for index in range(count)})
    waveform, pairs = collate_visits([run.clips[0, clip] for clip in clips]).data
    spec, mask = trainer.prepare(waveform, pairs)
    names = [Path(manifest.path(clip)).stem for clip in pairs[:, 1].tolist()]
    return reconstruction_examples(trainer.model, trainer.front_end, spec, mask, names=names)


def train(config: PretrainConfig, ranks: Ranks, run: Run, log: RunLog | NullLog, supervisor: Supervisor) -> None:
    """Train all epochs that are left, with pictures and checkpoints between them."""
    trainer, steps = run.trainer, run.trainer.steps_per_epoch
    first_step = trainer.progress.step
    for note in [*run.notes, *supervisor.notes]:
        log.message(note)
    if first_step >= config.epochs * steps:
        log.message(f"nothing to do: the {config.epochs} epochs of the run are done")
        return
    supervisor.begin()
    log.start(total_steps=config.epochs * steps, first_step=first_step, steps_per_epoch=steps, epochs=config.epochs)
    trainer.faults.start(log)
    for epoch in range(first_step // steps + 1, config.epochs + 1):
        result = trainer.run_epoch(epoch - 1, log, supervisor)
        last = epoch == config.epochs
        keep = bool(config.keep_every) and epoch % config.keep_every == 0
        due = epoch % config.save_every == 0 or supervisor.saves_after(epoch * steps)
        if last or result.stop or keep or due:
            trainer.save(log, supervisor, keep=epoch if keep else None)
        # Ranks that hold shards of the model compute together.
        draws = ranks.main or config.parallel == "fsdp"
        if draws and config.picture_every and (last or epoch % config.picture_every == 0):
            supervisor.mark(trainer.progress.step, "drawing")
            log.picture("reconstruction", draw_examples(run), epoch * steps)
        if last:
            log.message(
                f"loss over the last epoch: {result.loss:.4f}; "
                f"the mean of every patch scores {result.scalars['baseline_loss']:.4f}\n"
                f"weights, log, pictures and checkpoint are in {config.output_dir}"
            )
        elif result.stop:
            raise Stopped(result.stop, trainer.progress.step)
    ranks.barrier()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(PROG, partial(run_pretraining, arguments))


def run_pretraining(arguments: Sequence[str] | None) -> int:
    """Pre-train as the command line says, and return the exit status.

    Raises:
        SetupError: What is wrong with settings, data or checkpoints.
    """
    config = parse_arguments(arguments)
    with join_ranks(config.device, patience=config.rank_patience) as ranks:
        return run_joined(config, ranks)


def run_joined(config: PretrainConfig, ranks: Ranks) -> int:
    """Pre-train on all ranks, and return the exit status."""
    run = agree(ranks, partial(build, config, ranks))
    agree_on_step(ranks, run.trainer.progress.step)
    with Supervisor(config, ranks, run.resumed) as supervisor:
        return carry_out(PROG, ranks, supervisor, partial(record, config, ranks, run, supervisor))


def record(config: PretrainConfig, ranks: Ranks, run: Run, supervisor: Supervisor) -> None:
    """Train with a log on the main rank."""
    with RunLog(config.output_dir) if ranks.main else NullLog() as log:
        train(config, ranks, run, log, supervisor)


if __name__ == "__main__":
    main()

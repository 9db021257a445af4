"""Fine-tune an Audio-MAE encoder on labelled clips.

    python -m audiomae.finetune --checkpoint runs/demo/weights.safetensors        # the kinds of the demo clips
    python -m audiomae.finetune --recipe esc50 --data ESC-50 --checkpoint FILE    # all five folds
    torchrun --nproc-per-node 8 -m audiomae.finetune --recipe finetune-audioset --data audioset --checkpoint FILE
    python -m audiomae.finetune --dataset manifest --data train.csv --valid-data valid.csv --test-data test.csv

--recipe NAME gives the settings, with --variant and --size; every other flag changes one of them. The output folder
gets log.jsonl, TensorBoard files, the last checkpoint, the weights of the last and the best epoch, and results.json
with reports on the splits.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mae_kernels.ops import resolve_forms
from torch.utils.data import DataLoader

from audiomae.atomic import replacing
from audiomae.checkpoints import load_classifier, save_weights, start_classifier
from audiomae.checkpoints.checksum import file_hash
from audiomae.classifier import AudioClassifier, AudioClassifierConfig
from audiomae.data import ClipBatches, Replacing
from audiomae.data.labelled import Augmentation, LabelledClips, class_balanced_weights
from audiomae.data.sampling import EvaluationBatches
from audiomae.data.sets import ESC50_FOLDS, Task, read_task
from audiomae.metrics import Evaluation, evaluate_scores, fold_summary, headline, write_report
from audiomae.recipes import FINETUNE_RECIPES
from audiomae.training.command import (
    agree,
    agree_on_step,
    agree_so_far,
    make_loader,
    make_training_loader,
    parse_run,
    run_command,
    share_processors,
)
from audiomae.training.config import FinetuneConfig, SetupError, autocast_dtype
from audiomae.training.distributed import Ranks, join_ranks
from audiomae.training.ending import carry_out
from audiomae.training.faults import report_unread
from audiomae.training.finetuner import Finetuner, draw_mask, score_clips
from audiomae.training.logging import NullLog, RunLog
from audiomae.training.optimizer import build_layer_decayed_adamw
from audiomae.training.parallel import distribute
from audiomae.training.progress import Progress
from audiomae.training.rollcall import WAITING_FOR_RANKS
from audiomae.training.signals import Stopped
from audiomae.training.state import LAST, Resumed, find_checkpoints, resume, resume_optimizer
from audiomae.training.supervisor import Supervisor

PROG = "audiomae.finetune"
BEST_WEIGHTS = "weights-best.safetensors"
RESULTS = "results.json"
CHOOSE = ("select", "dataset", "data", "valid_data", "test_data", "labels")
"""Settings that the value of an epoch depends on."""


def parse_arguments(arguments: Sequence[str] | None = None) -> FinetuneConfig:
    """Read the command line.

    Raises:
        SetupError: An unknown recipe, variant or size.
    """
    return parse_run(FinetuneConfig, FINETUNE_RECIPES, arguments, prog=f"python -m {PROG}", description=__doc__)


@dataclass(frozen=True)
class Run:
    """Everything that a run needs.

    Attributes:
        task: The data set.
        trainer: Trains on its training split.
        splits: Loader of this rank's share of each split that is evaluated, by name.
        resumed: Where the run goes on; None for a new one.
        best_weights: Where the weights of the best epoch are, which may be the folder of the run that this one goes on
            from.
        notes: Lines that tell what the run is.
    """

    task: Task
    trainer: Finetuner
    splits: dict[str, DataLoader[Any]]
    resumed: Resumed | None
    best_weights: Path
    notes: list[str]


def build(config: FinetuneConfig, ranks: Ranks) -> Run:
    """Make everything that a run needs, so that whatever is wrong with its settings is found before any work.

    Raises:
        ValueError: Settings that do not go together, labels that are not known, or a checkpoint that does not fit.
        OSError: A file or folder that is missing or cannot be read.
    """
    config.check_stats()
    checkpoints = find_checkpoints(config)
    task = read_task(
        config.dataset,
        config.data,
        fold=config.fold,
        labels=config.labels,
        valid=config.valid_data,
        test=config.test_data,
        seed=config.seed,
        allow_outside=config.allow_outside,
    )
    if config.select != "last" and getattr(task, config.select) is None:
        raise ValueError(f"select is {config.select}, but {task.name} has no {config.select} split: take --select last")
    samples = config.model.front_end().num_samples(config.model.spec_size[0])
    clips = partial(
        LabelledClips,
        sample_rate=config.model.sample_rate,
        samples=samples,
        spec_size=config.model.spec_size,
        seed=config.seed,
    )
    classes = task.labels.indices(task.train, single=not config.multi_label)
    batches = ClipBatches(
        len(task.train),
        config.batch_size,
        config.seed,
        config.repeats,
        rank=ranks.rank,
        world_size=ranks.world_size,
        splits=config.accumulation,
        weights=None if config.balanced_clips is None else class_balanced_weights(classes),
        epoch_clips=config.balanced_clips,
    )

    torch.manual_seed(config.seed)
    model, notes = build_model(config, task)
    model.to(ranks.device)
    resumed, progress = None, Progress()
    best_weights = config.output_dir / BEST_WEIGHTS
    if checkpoints:
        resumed = resume(
            checkpoints, config, model, task.train, steps_per_epoch=batches.steps, world_size=ranks.world_size
        )
        if "fold" in resumed.changed:
            raise ValueError(f"{resumed.path} is of another fold: it was trained on clips that this one tests on")
        progress, best_weights = resumed.progress, resumed.path.parent / BEST_WEIGHTS
        notes += [*resumed.notes, *carry_best(resumed, best_weights)]
    agree_so_far(ranks)
    replica = distribute(model, config, ranks)
    optimizer = build_layer_decayed_adamw(
        model,
        lr=config.peak_lr,
        weight_decay=config.weight_decay,
        betas=config.betas,
        layer_decay=config.layer_decay,
    )
    if resumed is not None:
        resume_optimizer(optimizer, resumed)

    workers = share_processors(config.workers, ranks)
    train_clips = Replacing(clips(task.train, classes, augmentation=augmentation_of(config)), config.seed)
    loader = make_training_loader(train_clips, samples, batches, ranks, workers)
    front_end = config.model.front_end().to(ranks.device)
    trainer = Finetuner(config, ranks, model, replica, optimizer, front_end, task.train, batches, loader, progress)
    splits = {}
    for name, manifest in (("valid", task.valid), ("test", task.test)):
        if manifest is not None:
            share = EvaluationBatches(
                len(manifest), batches.batch_size // (ranks.world_size * batches.splits), ranks.rank, ranks.world_size
            )
            splits[name] = make_loader(
                clips(manifest, task.labels.indices(manifest, single=not config.multi_label)), share, ranks, workers
            )
    return Run(task, trainer, splits, resumed, best_weights, [*describe(config, ranks, task, trainer), *notes])


def build_model(config: FinetuneConfig, task: Task) -> tuple[AudioClassifier, list[str]]:
    """Make the model and start it; also return lines that tell what was changed or left out.

    Raises:
        ValueError: Sizes that do not go together, or a checkpoint that does not fit.
        FileNotFoundError: No such checkpoint.
    """
    model = AudioClassifier(
        AudioClassifierConfig(
            **config.model.encoder_settings(),
            num_classes=len(task.labels),
            labels=task.labels.names,
            multi_label=config.multi_label,
            activation="sigmoid" if config.loss == "bce" else "softmax",
            drop_path=0.0 if config.freeze else config.drop_path,
        ),
        impl="auto" if config.fused else "reference",
    )
    draw_mask(config, model.grid, torch.zeros(1, dtype=torch.int64))
    if config.freeze:
        model.encoder.requires_grad_(False)
    if config.checkpoint is None:
        return model, ["starts from random weights; --checkpoint FILE starts from pre-trained ones"]
    notes = start_classifier(model, config.checkpoint, reset_head=config.reset_head)
    return model, [f"starts from {config.checkpoint}", *notes]


def carry_best(resumed: Resumed, weights: Path) -> list[str]:
    """Forget the best epoch so far unless it was chosen as this run chooses and its weights are at hand; tell if so."""
    best = resumed.progress.best
    if best is None:
        return []
    chosen_otherwise = [name for name in CHOOSE if name in resumed.changed]
    # A run that was killed between two saves, or goes on from a checkpoint that was kept, may find those of a later
    # epoch.
    if not chosen_otherwise and weights.exists() and file_hash(weights) == best["weights"]:
        return []
    resumed.progress.best = None
    reason = f"{', '.join(chosen_otherwise)} changed" if chosen_otherwise else "its weights are not at hand"
    return [f"the best epoch until now, {best['epoch']}, is left out: {reason}"]


def augmentation_of(config: FinetuneConfig) -> Augmentation:
    """The augmentation of a run's training clips."""
    return Augmentation(
        gain=config.gain,
        roll=config.roll,
        mixup=config.mixup,
        mixup_alpha=config.mixup_alpha,
        noise_db=config.noise_db,
        time_mask=config.time_mask,
        frequency_mask=config.frequency_mask,
    )


def describe(config: FinetuneConfig, ranks: Ranks, task: Task, trainer: Finetuner) -> list[str]:
    """Tell what a run is."""
    model, grid = trainer.model, trainer.model.grid
    mask = draw_mask(config, grid, torch.zeros(1, dtype=torch.int64))
    kept = grid.num_patches if mask is None else mask.ids_keep.shape[1]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    dtype = autocast_dtype(config.precision, ranks.device)
    forms = resolve_forms(model.impl, ranks.device.type, dtype)
    operators = ", ".join(f"{name} {forms[name][0]}" for name in ("patch_embed", "add_layer_norm", "mlp"))
    chosen = {
        "valid": "the best epoch is chosen on the validation split",
        "test": "the best epoch is chosen on the test split, as the published protocol of this data set does: "
        "its figure is optimistic, that of the last epoch stands beside it",
        "last": "the last epoch counts",
    }
    return [
        f"recipe {config.recipe} ({config.variant}): {config.epochs} epochs of {trainer.steps_per_epoch} steps of "
        f"{config.batch_size} clips",
        *task.notes,
        f"model: {total / 1e6:.1f} M parameters, {trained / 1e6:.3g} M of them trained, {1 + kept} of "
        f"{1 + grid.num_patches} tokens a clip, {'bf16' if dtype == torch.bfloat16 else 'fp32'} on "
        f"{ranks.world_size} x {ranks.device.type}",
        f"operators: {operators}" if config.fused else "operators: reference (plain PyTorch)",
        chosen[config.select],
    ]


def train(config: FinetuneConfig, ranks: Ranks, run: Run, log: RunLog | NullLog, supervisor: Supervisor) -> None:
    """Train all epochs that are left, evaluate between them, and report on the chosen one at the end."""
    trainer, progress, steps = run.trainer, run.trainer.progress, run.trainer.steps_per_epoch
    first_step, best_weights = progress.step, config.output_dir / BEST_WEIGHTS
    for note in [*run.notes, *supervisor.notes]:
        log.message(note)
    if first_step >= config.epochs * steps:
        log.message(f"nothing to train: the {config.epochs} epochs of the run are done")
    else:
        supervisor.begin()
    if ranks.main and progress.best is not None and run.best_weights != best_weights:
        with replacing(best_weights) as temporary:
            shutil.copyfile(run.best_weights, temporary)
    log.start(total_steps=config.epochs * steps, first_step=first_step, steps_per_epoch=steps, epochs=config.epochs)
    trainer.faults.start(log)
    for epoch in range(first_step // steps + 1, config.epochs + 1):
        result = trainer.run_epoch(epoch - 1, log, supervisor)
        last, improved = epoch == config.epochs, False
        if config.select != "last" and (last or epoch % config.eval_every == 0):
            name, value = headline(evaluate(run, config.select, log, supervisor))
            log.evaluation(step=epoch * steps, epoch=epoch, **{f"{config.select} {name}": value})
            if progress.best is None or not value <= progress.best["value"]:  # also better than one that is no number
                progress.best, improved = {"epoch": epoch, "value": value, "weights": None}, True
                if ranks.main:
                    save_weights(best_weights, trainer.model)
                    progress.best["weights"] = file_hash(best_weights)
        # With the weights of the best epoch goes the state that knows of them.
        keep = bool(config.keep_every) and epoch % config.keep_every == 0
        due = epoch % config.save_every == 0 or supervisor.saves_after(epoch * steps)
        if last or improved or result.stop or keep or due:
            trainer.save(log, supervisor, keep=epoch if keep else None)
        if result.stop and not last:
            raise Stopped(result.stop, progress.step)
    report(config, ranks, run, log, supervisor)


def evaluate(run: Run, split: str, log: RunLog | NullLog, supervisor: Supervisor) -> Evaluation:
    """Evaluate the model as it is on a split, on all ranks.

    Raises:
        TooManySkippedError: More of its clips than may be left out cannot be read.
    """
    trainer = run.trainer
    evaluating = partial(supervisor.mark, trainer.progress.step, f"evaluating on {split}")
    evaluating()
    scores, targets, unread = score_clips(
        trainer.model,
        trainer.front_end,
        run.splits[split],
        trainer.ranks,
        trainer.precision,
        on_batch=evaluating,
        on_wait=partial(supervisor.mark, trainer.progress.step, WAITING_FOR_RANKS),
    )
    manifest = {"valid": run.task.valid, "test": run.task.test}[split]
    assert manifest is not None
    for line in report_unread(unread, manifest, trainer.config.max_skipped, split, trainer.config.output_dir / split):
        log.message(line)
    return evaluate_scores(scores, targets, run.task.labels.names, multi_label=trainer.config.multi_label)


def report(config: FinetuneConfig, ranks: Ranks, run: Run, log: RunLog | NullLog, supervisor: Supervisor) -> None:
    """Evaluate the last and the chosen epoch on all splits, and write and tell what came out."""
    best = run.trainer.progress.best
    evaluations = {split: evaluate(run, split, log, supervisor) for split in run.splits}
    last = {split: evaluation.summary() for split, evaluation in evaluations.items()}
    best_epoch = config.epochs if best is None else best["epoch"]
    if best_epoch != config.epochs:
        if ranks.main:  # the others may not see its folder
            run.trainer.model.load_state_dict(load_classifier(config.output_dir / BEST_WEIGHTS).state_dict())
        ranks.broadcast(run.trainer.model)
        evaluations = {split: evaluate(run, split, log, supervisor) for split in run.splits}
    for split, evaluation in evaluations.items():
        name, value = headline(evaluation)
        if ranks.main:
            write_report(evaluation, config.output_dir / split)
        log.message(
            f"{split}: {name} {value:.4f} after epoch {best_epoch}, "
            f"{last[split][name]:.4f} after the last, {config.epochs}"
        )
    if ranks.main:
        results = {
            "dataset": run.task.name,
            "fold": config.fold,
            "chosen_on": config.select,
            "epochs": config.epochs,
            "best_epoch": best_epoch,
            "best": {split: evaluation.summary() for split, evaluation in evaluations.items()},
            "last": last,
        }
        write_json(config.output_dir / RESULTS, results)
    log.message(f"weights, log, checkpoint and reports are in {config.output_dir}")
    ranks.barrier()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary, numbers that are not finite as null; a crash leaves the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarise_folds(config: FinetuneConfig, folds: Sequence[int]) -> None:
    """Write and tell the mean and deviation over the folds of a cross-validation."""
    results = [json.loads((config.output_dir / f"fold-{fold}" / RESULTS).read_text()) for fold in folds]
    summary = {when: fold_summary([result[when]["test"] for result in results]) for when in ("best", "last")}
    write_json(config.output_dir / RESULTS, {"dataset": config.dataset, "folds": list(folds), **summary})
    for when, values in summary.items():
        top1 = values["top-1"]
        print(f"{len(folds)} folds, {when} epoch of each: top-1 {top1['mean']:.4f}, deviation {top1['std']:.4f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(PROG, partial(run_finetuning, arguments))


def run_finetuning(arguments: Sequence[str] | None) -> int:
    """Fine-tune as the command line says, and return the exit status.

    Raises:
        SetupError: What is wrong with settings, data or checkpoints.
    """
    config = parse_arguments(arguments)
    with join_ranks(config.device, patience=config.rank_patience) as ranks:
        if config.dataset != "esc50" or config.fold is not None:
            return run_one(config, ranks)
        if config.resume not in (None, "auto"):
            raise SetupError(
                f"resume is {config.resume}, but five folds go on from five checkpoints: take auto, or a fold"
            )
        if (config.output_dir / LAST).exists():
            raise SetupError(f"{config.output_dir} holds the run of a fold: choose another --output-dir for all five")
        for fold in ESC50_FOLDS:
            status = run_one(replace(config, fold=fold, output_dir=config.output_dir / f"fold-{fold}"), ranks)
            if status:
                return status
        if ranks.main:
            summarise_folds(config, ESC50_FOLDS)
        return 0


def run_one(config: FinetuneConfig, ranks: Ranks) -> int:
    """Run one fine-tuning, from its data set to its report, and return the exit status."""
    run = agree(ranks, partial(build, config, ranks))
    agree_on_step(ranks, run.trainer.progress.step)
    with Supervisor(config, ranks, run.resumed) as supervisor:
        return carry_out(PROG, ranks, supervisor, partial(record, config, ranks, run, supervisor))


def record(config: FinetuneConfig, ranks: Ranks, run: Run, supervisor: Supervisor) -> None:
    """Train with a log on the main rank."""
    with RunLog(config.output_dir) if ranks.main else NullLog() as log:
        train(config, ranks, run, log, supervisor)


if __name__ == "__main__":
    main()

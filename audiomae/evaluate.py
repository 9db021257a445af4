"""Evaluate a fine-tuned classifier on a split of a data set, each clip once over any number of ranks.

    python -m audiomae.evaluate --checkpoint runs/finetune-demo/weights-best.safetensors --split valid    # demo clips
    python -m audiomae.evaluate --checkpoint FILE --dataset esc50 --data ESC-50 --fold 1
    torchrun --nproc-per-node 8 -m audiomae.evaluate --checkpoint FILE --dataset audioset --data audioset
    python -m audiomae.evaluate --checkpoint FILE --dataset manifest --data clips.csv

The classes are the checkpoint's; a file without names of its classes takes those of the data set, in its order. The
output folder gets evaluation.json, classes.csv and a picture.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from audiomae.checkpoints import load_classifier
from audiomae.classifier import AudioClassifier
from audiomae.data import Labels, Manifest, read_labels
from audiomae.data.labelled import LabelledClips
from audiomae.data.sampling import EvaluationBatches
from audiomae.data.sets import read_labelled, read_task
from audiomae.metrics import Evaluation, evaluate_scores, print_table, write_report
from audiomae.training.command import agree, make_loader, run_command, share_processors
from audiomae.training.config import autocast_dtype
from audiomae.training.distributed import Ranks, is_main_process, join_ranks
from audiomae.training.ending import end_rank, error_line
from audiomae.training.faults import TooManySkippedError, report_unread
from audiomae.training.finetuner import score_clips

PROG = "audiomae.evaluate"


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation."""

    checkpoint: str
    """Fine-tuned weights: a file or hub id, of this package, the official code or timm."""
    dataset: str = "demo"
    """Data set, as for audiomae.finetune; manifest for your own list of clips."""
    data: str | None = None
    """Folder of the data set; with manifest, the clips to evaluate on: a CSV, a JSON, or a folder."""
    split: Literal["train", "valid", "test"] = "test"
    """Split of the data set."""
    fold: int | None = None
    """Fold of ESC-50 that was tested on."""
    labels: str | None = None
    """File of the classes, as AudioSet's class_labels_indices.csv or one a line, for manifests whose labels are keys or
    checkpoints without names."""
    output_dir: Path = Path("runs/evaluation")
    """Where the report goes."""

    batch_size: int = 64
    """Clips at a time, for each rank."""
    workers: int | None = None
    """Processes that read clips, for each rank; None: up to 8 with a GPU, 1 on a CPU."""
    fused: bool = False
    """Take the fastest form at hand of each operator instead of plain PyTorch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast: auto is bf16 on GPUs and fp32 on CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes a GPU where there is one."""
    max_skipped: float = 0.01
    """Share of the clips that may be left out because they cannot be read; with more there is no report."""
    allow_outside: bool = False
    """Allow paths in manifests that lead out of the manifest's folder."""

    def __post_init__(self) -> None:
        """Check single settings."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}, expected at least 0")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped is {self.max_skipped}, expected a share from 0 to 1")
        if self.dataset == "manifest" and (self.fold is not None or self.split != "test"):
            raise ValueError("fold and split are of data sets; with manifest, data names the clips themselves")


def read_split(config: EvaluateConfig, model: AudioClassifier) -> tuple[Labels, Manifest]:
    """Find the clips, and the classes in the order of the model's.

    Raises:
        ValueError: A split that the data set lacks, or other classes than the model's.
        OSError: A file or folder that is missing or cannot be read.
    """
    names = model.config.labels
    if config.dataset == "manifest":
        if config.data is None:
            raise ValueError("data is not given, expected the clips to evaluate on")
        if config.labels is None and not names:
            raise ValueError(f"{config.checkpoint} does not name its classes, expected labels: a file that does")
        labels = Labels(names, names) if config.labels is None else read_labels(config.labels)
        manifest = read_labelled(Path(config.data), allow_outside=config.allow_outside)
    else:
        task = read_task(
            config.dataset,
            config.data,
            fold=config.fold,
            labels=config.labels,
            allow_outside=config.allow_outside,
        )
        chosen = {"train": task.train, "valid": task.valid, "test": task.test}[config.split]
        if chosen is None:
            raise ValueError(f"{task.name} has no {config.split} split")
        labels, manifest = task.labels, chosen
    if len(labels) != model.config.num_classes:
        raise ValueError(f"{config.checkpoint} has {model.config.num_classes} classes, the data has {len(labels)}")
    if names and labels.names != names:
        first = next(i for i, (a, b) in enumerate(zip(names, labels.names, strict=True)) if a != b)
        raise ValueError(
            f"{config.checkpoint} has {names[first]!r} as class {first}, the data has {labels.names[first]!r}"
        )
    return labels, manifest


def evaluate(config: EvaluateConfig, ranks: Ranks) -> Evaluation:
    """Load, score and evaluate.

    Raises:
        SetupError: What is wrong with the checkpoint or the data.
        OSError: None of the clips can be read.
        TooManySkippedError: More clips than may be left out cannot be read.
    """
    impl = "auto" if config.fused else "reference"
    model = agree(ranks, partial(load_classifier, config.checkpoint, impl)).to(ranks.device)
    labels, manifest = agree(ranks, partial(read_split, config, model))
    front_end = model.config.front_end().to(ranks.device)
    frames = model.config.spec_size[0]
    clips = agree(
        ranks,
        lambda: LabelledClips(
            manifest,
            labels.indices(manifest, single=not model.config.multi_label),
            sample_rate=model.config.sample_rate,
            samples=front_end.num_samples(frames),
            spec_size=model.config.spec_size,
        ),
    )
    batches = EvaluationBatches(len(clips), config.batch_size, ranks.rank, ranks.world_size)
    loader = make_loader(clips, batches, ranks, share_processors(config.workers, ranks))
    precision = autocast_dtype(config.precision, ranks.device)
    scores, targets, unread = score_clips(model, front_end, loader, ranks, precision)
    split = "the manifest" if config.dataset == "manifest" else config.split
    for line in report_unread(unread, manifest, config.max_skipped, split, config.output_dir):
        if ranks.main:
            print(line, file=sys.stderr)
    return evaluate_scores(scores, targets, labels.names, multi_label=model.config.multi_label)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(PROG, partial(run_evaluation, arguments))


def run_evaluation(arguments: Sequence[str] | None) -> None:
    """Evaluate as the command line says.

    Raises:
        SetupError: What is wrong with settings, data or the checkpoint.
    """
    config = tyro.cli(
        EvaluateConfig,
        args=arguments,
        prog=f"python -m {PROG}",
        description=__doc__,
        console_outputs=is_main_process(),
    )
    with join_ranks(config.device) as ranks:
        try:
            evaluation = evaluate(config, ranks)
            if ranks.main:
                write_report(evaluation, config.output_dir)
        except TooManySkippedError as error:  # the same on all ranks
            end_rank(ranks, f"{PROG}: error: {error}" if ranks.main else "")
        except (OSError, ValueError) as error:
            end_rank(ranks, error_line(PROG, ranks, error))
        if ranks.main:
            print_table(evaluation, Console())
            print(f"evaluation.json, classes.csv and evaluation.png are in {config.output_dir}")


if __name__ == "__main__":
    main()

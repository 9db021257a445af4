"""Tell what is to be heard in sound files, by a fine-tuned classifier.

    python -m audiomae.predict dog.wav more-clips/ --checkpoint runs/finetune-demo/weights-best.safetensors
    python -m audiomae.predict concert.flac --checkpoint official.pth --labels class_labels_indices.csv --timeline

FILES are sound files, folders of them, or manifests (.csv, .json). A model hears a fixed length: a longer file is cut
into windows of that, and its probabilities are the mean of theirs, in which the last window counts for as much as the
file fills of it. --timeline also tells of each window. --json prints a line of JSON for each file instead.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from audiomae.checkpoints import load_classifier
from audiomae.classifier import AudioClassifier
from audiomae.data.labels import read_labels
from audiomae.data.windowed import ClipWindows, HeardClip, UnreadableClip, hear_clips, list_clips
from audiomae.frontend import LogMel
from audiomae.training.command import run_on_files, share_processors
from audiomae.training.config import autocast_dtype
from audiomae.training.distributed import Ranks
from audiomae.windows import Windows

PROG = "audiomae.predict"
BAR_WIDTH = 24


@dataclass(frozen=True)
class PredictConfig:
    """Settings of the command."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Sound files, folders of them, or manifests."""
    checkpoint: str
    """Fine-tuned model: a file or hub id."""
    labels: str | None = None
    """File of the classes' names, as AudioSet's class_labels_indices.csv or one a line; None takes the checkpoint's."""

    top: int = 5
    """Classes to tell of, at most."""
    timeline: bool = False
    """Tell of each window, too."""
    json: bool = False
    """Print JSON, one line for each file."""
    allow_outside: bool = False
    """Allow paths in manifests that lead out of the manifest's folder."""

    batch_size: int = 16
    """Windows at a time, of as many files as it takes."""
    workers: int | None = None
    """Processes that read files. None: up to 8 with a GPU, 1 on a CPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast: auto is bf16 on GPUs and fp32 on CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes a GPU where there is one."""


@dataclass(frozen=True)
class Job:
    """Everything that the files have in common.

    Attributes:
        clips: The windows of all files.
        model: In evaluation mode.
        front_end: Where the model is.
        names: Of the classes; empty where they are not known.
        workers: Processes that read.
        precision: Of autocast; float32 is none.
        device: Of the model.
    """

    clips: ClipWindows
    model: AudioClassifier
    front_end: LogMel
    names: tuple[str, ...]
    workers: int
    precision: torch.dtype
    device: torch.device


def build(config: PredictConfig, ranks: Ranks) -> Job:
    """Find the files and load the model, so that wrong settings are found before any work.

    Raises:
        ValueError: Settings that make no sense, labels of other classes, or a checkpoint, folder or manifest that does
            not serve.
        OSError: A checkpoint, label file or manifest that is missing or cannot be read.
    """
    if not config.files:
        raise ValueError("no files given, expected sound files, folders or manifests")
    for name in ("top", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected at least 1")
    manifest = list_clips(config.files, allow_outside=config.allow_outside)
    model = load_classifier(config.checkpoint).to(ranks.device).eval()
    if model.config.in_channels != 1:
        raise ValueError(
            f"{config.checkpoint} is a model of {model.config.in_channels} channels, expected 1: files are read as mono"
        )
    names = model.config.labels
    if config.labels is not None:
        names = read_labels(config.labels).names
        if len(names) != model.config.num_classes:
            raise ValueError(
                f"{config.labels} names {len(names)} classes, {config.checkpoint} has {model.config.num_classes}"
            )
    return Job(
        ClipWindows(manifest, Windows.of(model.config)),
        model,
        model.config.front_end().to(ranks.device),
        names,
        share_processors(config.workers, ranks),
        autocast_dtype(config.precision, ranks.device),
        ranks.device,
    )


@torch.no_grad()
def score_windows(job: Job, windows: Tensor, lengths: Tensor) -> list[Tensor]:
    """Give the probabilities ``(classes,)`` of each of windows ``(B, samples)``, ``lengths (B,)`` without padding."""
    spec = job.front_end(windows.to(job.device), job.model.config.spec_size[0], lengths)
    with torch.autocast(job.device.type, job.precision, enabled=job.precision != torch.float32):
        logits = job.model(spec)
    return list(job.model.scores(logits).cpu())


class Guess(NamedTuple):
    """A class, by its place among the model's outputs, and its probability."""

    class_id: int
    probability: float


class Part(NamedTuple):
    """What is to be heard from ``start`` to ``end``, in seconds from the clip's start, most probable first."""

    start: float
    end: float
    guesses: list[Guess]


class Prediction(NamedTuple):
    """What is to be heard in a clip.

    Attributes:
        path: Its file.
        start: Where in it the clip starts, s.
        whole: In all of it.
        parts: In each window.
    """

    path: str
    start: float
    whole: Part
    parts: list[Part]


def predict(job: Job, heard: HeardClip, top: int) -> Prediction:
    """Put the windows of a clip together."""
    manifest, windows = job.clips.manifest, job.clips.windows
    scores = torch.stack(heard.results)
    first_samples = torch.arange(len(scores)) * windows.hop
    lengths = windows.heard(heard.total - first_samples)
    mean = (scores * lengths[:, None]).sum(dim=0) / lengths.sum()
    bounds = [sample / windows.sample_rate for sample in (*first_samples.tolist(), heard.total)]
    return Prediction(
        manifest.path(heard.clip),
        manifest.segment(heard.clip)[0],
        Part(0.0, bounds[-1], best(mean, top)),
        [Part(start, end, best(row, top)) for (start, end), row in zip(pairwise(bounds), scores, strict=True)],
    )


def best(scores: Tensor, top: int) -> list[Guess]:
    """Give the classes of the highest ``scores (classes,)``."""
    found = scores.topk(min(top, len(scores)))
    return [Guess(*guess) for guess in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def as_json(prediction: Prediction, names: Sequence[str], timeline: bool) -> str:
    """Write a prediction as a line of JSON; "label" is null where the classes' names are not known."""

    def told(guesses: Sequence[Guess]) -> list[dict[str, Any]]:
        return [
            {"index": class_id, "label": names[class_id] if names else None, "probability": round(probability, 6)}
            for class_id, probability in guesses
        ]

    line: dict[str, Any] = {
        "path": prediction.path,
        "start": prediction.start,
        "seconds": prediction.whole.end,
        "top": told(prediction.whole.guesses),
    }
    if timeline:
        line["timeline"] = [
            {"start": start, "end": end, "top": told(guesses)} for start, end, guesses in prediction.parts
        ]
    return json.dumps(line)


def print_prediction(console: Console, prediction: Prediction, names: Sequence[str], timeline: bool) -> None:
    """Print a prediction for people."""

    def label(class_id: int) -> str:
        return names[class_id] if names else f"class {class_id}"

    path = prediction.path.encode(errors="backslashreplace").decode()  # a name need not be text
    part = f", {prediction.whole.end:.2f} s"
    if prediction.start:
        part += f" from {clock(prediction.start)} on"
    console.print(Text(path, style="bold"), Text(part), sep="", soft_wrap=True)
    table = Table.grid(padding=(0, 2), pad_edge=True)
    for class_id, probability in prediction.whole.guesses:
        bar = Bar(1.0, 0.0, probability, width=BAR_WIDTH)
        table.add_row(Text(f"{100 * probability:5.1f} %"), bar, Text(label(class_id)))
    console.print(table)
    if timeline:
        for start, end, guesses in prediction.parts:
            told = ", ".join(f"{label(class_id)} {100 * probability:.0f} %" for class_id, probability in guesses)
            console.print(Text(f"  {clock(start)} - {clock(end)}  {told}"), soft_wrap=True)
    console.print()


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds."""
    minutes, hundredths = divmod(round(100 * seconds), 6000)
    return f"{minutes}:{hundredths / 100:05.2f}"


def run(config: PredictConfig, job: Job) -> int:
    """Tell of all files; return how many of them failed, each of which is named in a line."""
    if not job.names:
        print(
            f"{PROG}: {config.checkpoint} does not name its classes: --labels FILE does, for AudioSet its "
            "class_labels_indices.csv",
            file=sys.stderr,
        )
    console, failed = Console(highlight=False), 0
    heard = hear_clips(job.clips, partial(score_windows, job), batch_size=config.batch_size, workers=job.workers)
    for clip in heard:
        if isinstance(clip, UnreadableClip):
            failed += 1
            print(f"{PROG}: error: {clip.reason}", file=sys.stderr, flush=True)
            continue
        prediction = predict(job, clip, config.top)
        if config.json:
            print(as_json(prediction, job.names, config.timeline), flush=True)
        else:
            print_prediction(console, prediction, job.names, config.timeline)
    if failed:
        print(f"{PROG}: {failed} of {len(job.clips.manifest)} clips could not be read", file=sys.stderr)
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Wrong settings end it with one line and exit status 2. A file that cannot be read is named in a line, the others are
    told of, and the exit status is 1.
    """
    parse = partial(tyro.cli, PredictConfig, args=arguments, prog=f"python -m {PROG}", description=__doc__)
    run_on_files(PROG, parse, lambda config, ranks: run(config, build(config, ranks)))


if __name__ == "__main__":
    main()

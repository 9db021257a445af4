"""Check a data set: what it should hold, what is there, and what is missing.

    python -m audiomae.data.check esc50 ESC-50
    python -m audiomae.data.check audioset audioset --open --json report.json    # also opens every file
    python -m audiomae.data.check manifest train.csv --valid valid.csv --labels classes.txt

docs/datasets.md has the layouts. The exit status is 0 where all is there, 1 where something is missing or cannot be
read, and 2 where the data set is not there at all.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from audiomae.data.headers import read_header
from audiomae.data.labels import LabelError, Labels
from audiomae.data.manifests import Manifest
from audiomae.data.sets import DATA_SETS, Part, Survey, survey
from audiomae.data.sets.task import shorten

T = TypeVar("T")

PROG = "audiomae.data.check"
_CHUNK = 256  # clips that a thread looks at in one go
_THREADS = 16


@dataclass(frozen=True)
class CheckConfig:
    """What to check."""

    name: tyro.conf.Positional[str]
    """Data set: audioset, audioset-20k, esc50, speech-commands-v1, speech-commands-v2, voxceleb1, demo, or manifest for
    your own lists of clips."""
    root: tyro.conf.Positional[str | None] = None
    """Folder of the data set; with manifest, the clips to train on: a CSV, a JSON, or a folder."""
    labels: str | None = None
    """With manifest and audioset: file of the classes."""
    valid: str | None = None
    """With manifest and audioset: clips that choose the best epoch."""
    test: str | None = None
    """With manifest and audioset: clips to report on."""
    allow_outside: bool = False
    """Allow paths in manifests that lead out of the manifest's folder."""
    open_files: Annotated[bool, tyro.conf.arg(name="open")] = False
    """Open every file and read its header."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write what was found here, all names included."""
    names: int = 5
    """How many names to print of what is missing."""


@dataclass
class PartReport:
    """What was found of a list of clips.

    Attributes:
        name: What the list is.
        published: Clips of the complete data set; None where nobody published it.
        listed: Clips in the list.
        at_hand: Those whose files are there.
        missing: Names of those whose files are not.
        unreadable: Reasons by path; None where files were not opened.
        classes: Classes of the clips at hand.
        label_error: What is wrong with their labels.
    """

    name: str
    published: int | None
    listed: int
    at_hand: int
    missing: list[str]
    unreadable: dict[str, str] | None = None
    classes: int = 0
    label_error: str | None = None


@dataclass
class Sound:
    """What headers told: seconds of all clips, of the shortest and of the longest one, and clips by sample rate."""

    seconds: float = 0.0
    shortest: float = math.inf
    longest: float = 0.0
    sample_rates: dict[int, int] = field(default_factory=dict)

    def add(self, other: "Sound") -> None:
        """Take in what other headers told."""
        self.seconds += other.seconds
        self.shortest = min(self.shortest, other.shortest)
        self.longest = max(self.longest, other.longest)
        for rate, clips in other.sample_rates.items():
            self.sample_rates[rate] = self.sample_rates.get(rate, 0) + clips


@dataclass
class Report:
    """What was found of a data set.

    Attributes:
        data_set: Its name.
        root: Where it was looked for.
        complete: Whether all is there.
        classes: How many there are.
        published_classes: How many the complete data set has; None where nobody published it.
        classes_without_clips: Names of those that no clip at hand has.
        parts: Its lists of clips.
        sound: What the headers told, where files were opened.
        notes: What else is worth knowing.
    """

    data_set: str
    root: str
    complete: bool
    classes: int
    published_classes: int | None
    classes_without_clips: list[str]
    parts: list[PartReport]
    sound: Sound | None
    notes: list[str]


def check(found: Survey, open_files: bool = False) -> Report:
    """Look at everything that a data set lists.

    Args:
        found: What its reader found.
        open_files: Whether to read the header of each file, too.
    """
    sound = Sound() if open_files else None
    clips_of_class = np.zeros(len(found.labels), np.int64)
    parts = [_check_part(part, found.labels, clips_of_class, sound) for part in found.parts]
    empty = [name for name, clips in zip(found.labels.names, clips_of_class, strict=True) if clips == 0]
    if any(part.label_error for part in parts):
        empty = []  # not all clips were counted
    complete = (
        not empty
        and len(found.labels) >= (found.num_classes or 0)
        and not any(part.missing or part.unreadable or part.label_error for part in parts)
        and all(part.at_hand >= (part.published or 0) for part in parts)
    )
    return Report(
        data_set=found.request.name,
        root=str(found.request.root),
        complete=complete,
        classes=len(found.labels),
        published_classes=found.num_classes,
        classes_without_clips=empty,
        parts=parts,
        sound=sound if sound is not None and sound.sample_rates else None,
        notes=list(found.notes),
    )


def _check_part(part: Part, labels: Labels, clips_of_class: np.ndarray, sound: Sound | None) -> PartReport:
    """Look at one list of clips; add to the clips of each class, and to what headers tell."""
    report = PartReport(part.name, part.published, part.listed, part.at_hand, list(part.missing))
    manifest = part.manifest
    if manifest is None:
        return report
    if not part.looked_for:
        absent = [clip for clips in _scan(manifest, _find_absent, part.name) for clip in clips]
        report.missing = [manifest.path(clip) for clip in absent]
        report.at_hand = len(manifest) - len(absent)
        if report.at_hand == 0:
            return report
        manifest = manifest.select(sorted(set(range(len(manifest))) - set(absent)))
    if sound is not None:
        report.unreadable = {}
        for chunk, unreadable in _scan(manifest, _read_headers, part.name):
            report.unreadable |= unreadable
            sound.add(chunk)
    try:
        counts = labels.indices(manifest).counts()
    except LabelError as error:
        report.label_error = str(error)
    else:
        report.classes = int((counts > 0).sum())
        clips_of_class += counts
    return report


def _scan(manifest: Manifest, look: Callable[[Manifest, range], T], what: str) -> Iterator[T]:
    """Look at all clips, many at a time, with a progress bar."""
    chunks = [range(i, min(i + _CHUNK, len(manifest))) for i in range(0, len(manifest), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        done = pool.map(partial(look, manifest), chunks)
        console = Console(stderr=True)
        yield from track(done, what, len(chunks), console=console, transient=True, disable=not console.is_terminal)


def _find_absent(manifest: Manifest, clips: range) -> list[int]:
    return [clip for clip in clips if not os.path.isfile(manifest.path(clip))]


def _read_headers(manifest: Manifest, clips: range) -> tuple[Sound, dict[str, str]]:
    sound, unreadable = Sound(), {}
    for clip in clips:
        path, (start, duration) = manifest.path(clip), manifest.segment(clip)
        try:
            seconds, rate = read_header(path)
        except OSError as error:
            unreadable[path] = str(error).removeprefix(f"{path}: ")
            continue
        if start >= seconds:
            unreadable[path] = f"lasts {seconds:.4g} s, expected a part of it from {start:.4g} s on"
            continue
        length = min(seconds - start, duration or math.inf)
        sound.add(Sound(length, length, length, {rate: 1}))
    return sound, unreadable


def print_report(report: Report, names: int = 5) -> None:
    """Print what was found, for a person.

    Args:
        report: What was found.
        names: How many names to print of what is missing.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    data_set = DATA_SETS[report.data_set]
    where = f" in {report.root}" if data_set.needs_root else ""
    console.print(f"{data_set.title}{where}")
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)  # 80 columns hold it
    table.add_column("clips", no_wrap=True)
    for column in ("published", "listed", "at hand", "missing", "unreadable", "classes"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in report.parts:
        unreadable = None if part.unreadable is None else len(part.unreadable)
        numbers = [part.published, part.listed, part.at_hand, len(part.missing), unreadable, part.classes]
        table.add_row(part.name, *("-" if number is None else f"{number:,}" for number in numbers))
    console.print(table)
    for line in [*_describe_sound(report.sound), *report.notes, *_describe_faults(report, names)]:
        console.print(line)
    console.print("complete" if report.complete else "not complete")


def _describe_sound(sound: Sound | None) -> list[str]:
    if sound is None:
        return []
    rates = ", ".join(f"{clips:,} of {rate:,} Hz" for rate, clips in sorted(sound.sample_rates.items()))
    return [f"sound: {sound.seconds / 3600:.4g} h, clips of {sound.shortest:.4g} to {sound.longest:.4g} s: {rates}"]


def _describe_faults(report: Report, names: int) -> list[str]:
    lines = []
    for part in report.parts:
        if part.missing:
            lines.append(f"{part.name}: missing: {shorten(part.missing, names)}")
        if part.published is not None and part.listed < part.published:
            lines.append(f"{part.name}: {part.listed:,} clips, the complete data set has {part.published:,}")
        if part.unreadable:
            reasons = [f"{path} ({reason})" for path, reason in part.unreadable.items()]
            lines.append(f"{part.name}: unreadable: {shorten(reasons, names)}")
        if part.label_error is not None:
            lines.append(f"{part.name}: {part.label_error}")
    if report.published_classes is not None and report.classes < report.published_classes:
        lines.append(f"{report.classes} classes, the complete data set has {report.published_classes}")
    if report.classes_without_clips:
        empty = report.classes_without_clips
        lines.append(f"no clips of {len(empty)} of {report.classes} classes: {shorten(empty, names)}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = tyro.cli(CheckConfig, args=arguments, prog=f"python -m {PROG}", description=__doc__)
    try:
        found = survey(
            config.name,
            config.root,
            labels=config.labels,
            valid=config.valid,
            test=config.test,
            allow_outside=config.allow_outside,
        )
        report = check(found, open_files=config.open_files)
        if config.json_file is not None:
            config.json_file.write_text(json.dumps(asdict(report), indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        sys.exit(2)
    print_report(report, config.names)
    sys.exit(0 if report.complete else 1)


if __name__ == "__main__":
    main()

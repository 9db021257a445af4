"""Resample all clips once, to 16-bit mono FLAC or WAV of one sample rate; training then has less to read and to do.

    python -m audiomae.data.prepare sounds/ prepared/                      # a folder, a CSV or a JSON manifest
    python -m audiomae.data.prepare train.json prepared/ --format wav      # twice the size, faster to read
    python -m audiomae.pretrain --data prepared/manifest.csv

Clips keep their paths below the output folder. A run that was stopped, in whatever way, goes on with the same command:
what is there and whole is kept, unless its source has changed since. The output folder gets

    manifest.csv    the clips that are there, with their labels: what training reads
    failed.csv      those that cannot be read, with the reason
    clipped.csv     those that went beyond full scale, as resampled sound can, with how many samples were clipped
    report.json     the figures that are printed at the end
    prepare.json    the settings

The exit status is 0 where all clips are there, 1 where some failed, and 2 where settings are wrong, the disk is full,
or no clip can be read.
"""

import csv
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.filesize import decimal

from audiomae.atomic import replacing
from audiomae.data.manifests import Manifest, ManifestError, read_manifest
from audiomae.data.parallel import WorkerError, describe, map_clips, printable
from audiomae.data.preparation.conversion import Converter, Outcome
from audiomae.data.preparation.folder import INSIDE, SETTINGS, PreparedFolder
from audiomae.data.preparation.journal import Journal
from audiomae.data.preparation.placing import Places, is_among, stable_hash

PROG = "audiomae.data.prepare"
_CHUNK = 8  # clips that a process converts in one go
_MAX_RATE = 655_350  # Hz, of FLAC
_LIST, _FAILED, _CLIPPED, _REPORT = "manifest.csv", "failed.csv", "clipped.csv", "report.json"


@dataclass(frozen=True)
class PrepareConfig:
    """What to convert, and to what."""

    manifest: tyro.conf.Positional[str]
    """Folder of sound files, CSV, or AST / Audio-MAE JSON manifest."""
    out: tyro.conf.Positional[Path]
    """Folder to write to: a new or empty one, or that of an earlier run, which goes on."""
    sample_rate: int = 16_000
    """Sample rate of what is written, Hz."""
    format: Literal["flac", "wav"] = "flac"
    """Both hold the same 16-bit samples; flac is smaller."""
    workers: int | None = None
    """Processes; 0 works in the command's own. None: one for each processor."""
    allow_outside: bool = False
    """Allow paths in manifests that lead out of the manifest's folder. Their clips go to outside/."""
    names: int = 5
    """How many names to print of what failed."""

    def __post_init__(self) -> None:
        """Check single settings."""
        if not 1 <= self.sample_rate <= _MAX_RATE:
            raise ValueError(f"sample_rate is {self.sample_rate}, expected 1 to {_MAX_RATE:,} Hz")
        for name in ("workers", "names"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}, expected at least 0")


@dataclass
class Report:
    """What became of the clips.

    Attributes:
        clips: In the manifest.
        written: Files that this run wrote.
        again: Those of them that took the place of another file.
        kept: Files that were there.
        repeated: Clips that are the same sound as an earlier one, and share its file.
        failed: Clips that cannot be read.
        unlisted: Files in the folder that earlier runs wrote, of clips that the manifest no longer has.
        hours: Of sound in the folder.
        bytes_before: Size of the clips' files.
        bytes_after: Size of those that were made of them.
        clipped_samples: Samples beyond full scale.
        clipped_clips: Clips that have some.
        reasons: Path and reason of the first that failed.
    """

    clips: int
    written: int = 0
    again: int = 0
    kept: int = 0
    repeated: int = 0
    failed: int = 0
    unlisted: int = 0
    hours: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    clipped_samples: int = 0
    clipped_clips: int = 0
    reasons: list[str] = field(default_factory=list)


class _Books:
    """Lists and figures of what became of the clips, written as they come; the lists appear when ``files`` closes."""

    def __init__(self, manifest: Manifest, places: Places, out: Path, files: ExitStack):
        self.manifest, self.places, self.report = manifest, places, Report(len(manifest))
        self.frames = 0
        self._there = np.zeros(len(manifest), bool)
        self._counted = np.zeros(len(manifest), bool)
        self._label_column = _label_column(manifest)
        labels = () if self._label_column is None else (self._label_column,)
        self._list = _open_table(files, out / _LIST, "path", *labels)
        self._failed = _open_table(files, out / _FAILED, "path", "start", "duration", "reason")
        self._clipped = _open_table(files, out / _CLIPPED, "path", "clipped", "samples")

    def add(self, clip: int, outcome: Outcome, names: int) -> None:
        """Take in what became of the next clip."""
        report, entry, first = self.report, outcome.entry, self.places.first[clip]
        if outcome.kind in ("written", "again", "kept"):
            report.written += outcome.kind != "kept"
            report.again += outcome.kind == "again"
            report.kept += outcome.kind == "kept"
            self._there[clip] = True
            self.frames += entry.frames
            report.bytes_after += entry.bytes
            if not self._counted[file := self.places.file[clip]]:  # parts of a file count it once
                self._counted[file] = True
                report.bytes_before += entry.source_bytes
            if entry.clipped:
                report.clipped_samples += entry.clipped
                report.clipped_clips += 1
                self._clipped.writerow([self.places[clip], entry.clipped, entry.frames])
        report.repeated += outcome.kind == "repeated"
        if self._there[first]:
            labels = self.manifest.labels(clip)
            self._list.writerow([self.places[clip], *([",".join(labels)] if self._label_column else [])])
            return
        report.failed += 1
        path, (start, duration) = self.manifest.path(clip), self.manifest.segment(clip)
        reason = outcome.reason or f"as clip {first} is"
        self._failed.writerow([path, start or "", duration or "", reason])
        if len(report.reasons) < max(names, 1):
            report.reasons.append(f"{path}: {reason}")


def _open_table(files: ExitStack, path: Path, *columns: str) -> Any:
    """Open a CSV that appears when ``files`` closes. Names of files that are not UTF-8 keep their bytes."""
    temporary = files.enter_context(replacing(path))
    file = files.enter_context(temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape"))
    table = csv.writer(file)  # with its own ends of lines it quotes a name that holds either half of one
    table.writerow(columns)
    return table


def _label_column(manifest: Manifest) -> str | None:
    """Name the column of labels: ``label`` keeps commas inside of one, ``labels`` has several between them."""
    if not manifest.has_labels:
        return None
    several = False
    for clip in range(len(manifest)):
        labels = manifest.labels(clip)
        several |= len(labels) > 1
        if not all(map(_is_text, labels)):
            raise ManifestError(f"clip {clip} ({manifest.path(clip)}): label {labels!r} is no text that UTF-8 can hold")
    return "labels" if several else "label"


def _is_text(label: str) -> bool:
    return label.isascii() or not any("\ud800" <= c <= "\udfff" for c in label)


def prepare(config: PrepareConfig) -> Report:
    """Convert all clips of a manifest.

    Raises:
        ValueError: A manifest, a folder or settings that cannot be, or no clip can be read.
        OSError: The output cannot be written, as on a full disk.
        WorkerError: A process was killed or crashed.
    """
    source = Path(config.manifest)
    if source.is_dir() and config.out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{config.out} lies in {source}, where the next run would find it: take another folder")
    manifest = read_manifest(source, allow_outside=config.allow_outside)
    settings = {"manifest": os.path.abspath(source), "sample_rate": config.sample_rate, "format": config.format}
    with PreparedFolder(config.out, settings) as folder:
        for note in folder.notes:
            print(f"{PROG}: {note}", file=sys.stderr)
        places = Places(manifest, f".{config.format}", {INSIDE, SETTINGS, _LIST, _FAILED, _CLIPPED, _REPORT})
        converter = Converter(
            manifest,
            places,
            out=config.out,
            temporary=folder.temporary,
            journal=folder.journal,
            sample_rate=config.sample_rate,
            container=config.format,
        )
        done = map_clips(converter, len(manifest), what="clips", chunk=_CHUNK, workers=config.workers)
        with ExitStack() as files:
            books = _Books(manifest, places, config.out, files)
            for clip, outcome in enumerate(chain.from_iterable(done)):
                if outcome.kind == "stopped":
                    raise OSError(outcome.reason)
                books.add(clip, outcome, config.names)
            report = books.report
            if report.failed == len(manifest):
                raise ValueError(f"none of {len(manifest):,} clips can be read: {report.reasons[0]}")
            report.hours = books.frames / config.sample_rate / 3600
            report.unlisted = _count_unlisted(folder.journal, places, config.out)
            with replacing(config.out / _REPORT) as temporary:
                temporary.write_text(json.dumps({**settings, **asdict(report)}, indent=2) + "\n", encoding="utf-8")
    return report


def _count_unlisted(journal: Journal, places: Places, out: Path) -> int:
    """Count the files of earlier runs that are there but belong to no clip."""
    if not len(journal):
        return 0
    listed = places.hashes()
    others = {place for place in journal.places() if not is_among(listed, stable_hash(place))}
    return sum((out / place).exists() for place in others)


def print_report(report: Report, config: PrepareConfig) -> None:
    """Print what became of the clips, for a person."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    again = f" ({report.again:,} in place of other files)" if report.again else ""
    repeated = f", repeated in the list {report.repeated:,}" if report.repeated else ""
    console.print(f"{printable(config.manifest)}: {report.clips:,} clips")
    console.print(
        f"written {report.written:,}{again}, there already {report.kept:,}{repeated}, failed {report.failed:,}"
    )
    for reason in report.reasons[: config.names]:
        console.print(f"  {printable(reason)}")
    if report.failed > config.names:
        console.print(f"  and {report.failed - config.names:,} more")
    console.print(
        f"{report.hours:.4g} h at {config.sample_rate:,} Hz, "
        f"{decimal(report.bytes_before)} before, {decimal(report.bytes_after)} now"
    )
    if report.clipped_clips:
        console.print(
            f"clipped {report.clipped_samples:,} samples of {report.clipped_clips:,} clips, which went beyond full "
            f"scale: {config.out / _CLIPPED}"
        )
    if report.failed:
        console.print(f"what failed, and why: {config.out / _FAILED}")
    if report.unlisted:
        console.print(f"{report.unlisted:,} files of clips that the list no longer has stay in {config.out}")
    console.print(f"to train on them: python -m audiomae.pretrain --data {shlex.quote(str(config.out / _LIST))}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = tyro.cli(PrepareConfig, args=arguments, prog=f"python -m {PROG}", description=__doc__)
    try:
        report = prepare(config)
    except (ValueError, OSError, WorkerError) as error:
        print(f"{PROG}: error: {printable(describe(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    print_report(report, config)
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()

"""Look at all clips, and find the mean and standard deviation that normalise their log-mel spectrograms.

    python -m audiomae.data.stats sounds/ --out stats.json                 # a folder, a CSV or a JSON manifest
    python -m audiomae.data.stats train.json --clips 20000 --out stats.json    # mean and std from a random sample
    python -m audiomae.data.stats train.json --whole                       # every sample of every clip is decoded
    python -m audiomae.pretrain --data sounds/ --stats stats.json

Mean and std are those of what training sees: all frames of one random crop of each clip, as pre-training draws it
without its gain, and no padding. With --whole, clips are cut into crops instead, so that long ones count for more; it
finds clips that are cut off, or hold samples that are not finite, anywhere. A figure depends on the clips, the seed and
these settings alone, not on the number of processes.

A clip of which the crop alone is silent is named, and counts as fine, but is not among those that mean and std are of.

The exit status is 0 where all clips are fine, 1 where some are missing, broken or silent, and 2 where the manifest
cannot be read or none of its clips.
"""

import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from audiomae.atomic import replacing
from audiomae.data.clips import ClipDataset
from audiomae.data.log_mel_stats import SCHEMA, VERSION, Moments, StatsError
from audiomae.data.manifests import Manifest, read_manifest
from audiomae.data.parallel import WorkerError, describe, map_clips, printable
from audiomae.data.sound_files import ClipError, SilentClipError
from audiomae.data.streams import open_stream
from audiomae.frontend import LogMel
from audiomae.seeding import epoch_generator

PROG = "audiomae.data.stats"
_CHUNK = 64  # clips that a process looks at in one go
_LENGTHS = tuple(digit * 10.0**power for power in range(-2, 6) for digit in (1, 2, 5))
"""Edges between the bars of the histogram, s."""
_BAR = 44  # characters of the longest bar
_FAULTS = ("missing", "broken", "silent", "silent_crop")


@dataclass(frozen=True)
class StatsConfig:
    """What to look at, and how."""

    manifest: tyro.conf.Positional[str | None] = None
    """Folder of sound files, CSV, or AST / Audio-MAE JSON manifest. None: the demo clips that ship with the package."""
    out: Path | None = None
    """Write everything that was found here, as the JSON that --stats of the recipes reads."""
    clips: int | None = None
    """Take mean and std from so many clips at most, a random sample. Headers are read of all. None: all."""
    seconds: float = 10.0
    """Length of a crop, s. Shorter clips repeat themselves, as in pre-training."""
    whole: bool = False
    """Take every clip from its first to its last sample instead, cut into crops."""
    seed: int = 0
    """Seed of crops and sample."""
    sample_rate: int = 16_000
    """Sample rate of the waveforms, Hz."""
    num_mels: int = 128
    """Mel bins of the spectrograms."""
    workers: int | None = None
    """Processes; 0 works in the command's own. None: one for each processor."""
    allow_outside: bool = False
    """Read files that a CSV or JSON names outside of its folder."""
    names: int = 5
    """How many names to print of what is missing, broken or silent."""

    def __post_init__(self) -> None:
        """Check single settings."""
        for name, least in {"clips": 1, "sample_rate": 1, "workers": 0, "names": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        if not (math.isfinite(self.seconds) and round(self.seconds * self.sample_rate) >= 1):
            raise ValueError(f"seconds is {self.seconds}, expected a sample at least")


class Fault(NamedTuple):
    """A clip that is not fine, or not all of it.

    Attributes:
        clip: Its number in the manifest.
        kind: "missing", "broken", "silent", or "silent_crop" of one that is fine elsewhere.
        reason: What is wrong.
    """

    clip: int
    kind: str
    reason: str


@dataclass
class Findings:
    """What was found of some clips.

    Attributes:
        fine: Clips without a fault, or with a silent crop; what follows is of them alone.
        seconds: Of all.
        shortest: Of the shortest, s.
        longest: Of the longest, s.
        lengths: Clips between the edges of the histogram.
        sample_rates: Clips by sample rate, Hz.
        channels: Clips by number of channels.
        formats: Clips by container and sample format.
        heard: Clips behind the moments, none with a silent crop among them.
        moments: Of the values of their log-mel spectrograms.
        faults: Of the other clips, and silent crops.
    """

    fine: int = 0
    seconds: float = 0.0
    shortest: float = math.inf
    longest: float = 0.0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(len(_LENGTHS) + 1, np.int64))
    sample_rates: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    heard: int = 0
    moments: Moments = field(default_factory=Moments)
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        """Take in what was found of other clips."""
        self.fine += other.fine
        self.seconds += other.seconds
        self.shortest = min(self.shortest, other.shortest)
        self.longest = max(self.longest, other.longest)
        self.lengths += other.lengths
        self.sample_rates += other.sample_rates
        self.channels += other.channels
        self.formats += other.formats
        self.heard += other.heard
        self.moments = self.moments.merge(other.moments)
        # Reasons that are alike, as of a million missing files, are one string.
        self.faults += (fault._replace(reason=sys.intern(fault.reason)) for fault in other.faults)


class _Look:
    """Looks at clips, in any process."""

    def __init__(self, manifest: Manifest, config: StatsConfig):
        self.manifest, self.config = manifest, config
        self.samples = round(config.seconds * config.sample_rate)
        self.front_end = LogMel(config.sample_rate, config.num_mels)
        if self.front_end.num_frames(self.samples) == 0:
            raise ValueError(f"seconds is {config.seconds}, expected at least a frame of the spectrogram")
        self.crops = ClipDataset(manifest, config.sample_rate, self.samples, config.seed, gain_db=0)
        self.chosen = np.ones(len(manifest), bool)
        if config.clips is not None and config.clips < len(manifest):
            draw = epoch_generator(config.seed, 0, "stats")
            self.chosen[:] = False
            self.chosen[draw.choice(len(manifest), config.clips, replace=False, shuffle=False)] = True

    def __call__(self, clips: range) -> Findings:
        found = Findings()
        for clip in clips:
            try:
                found.add(self._look(clip))
            except SilentClipError as error:
                found.faults.append(self._fault(clip, "silent", error))
            except ClipError as error:
                kind = "broken" if os.path.exists(self.manifest.path(clip)) else "missing"
                found.faults.append(self._fault(clip, kind, error))
        return found

    def _fault(self, clip: int, kind: str, error: ClipError) -> Fault:
        return Fault(clip, kind, str(error).removeprefix(f"{self.manifest.path(clip)}: "))

    def _look(self, clip: int) -> Findings:
        """Look at one clip, or raise what is wrong with it."""
        path, segment = self.manifest.path(clip), self.manifest.segment(clip)
        with open_stream(path, self.config.sample_rate, segment) as stream:
            found = Findings(
                fine=1,
                seconds=stream.seconds,
                shortest=stream.seconds,
                longest=stream.seconds,
                sample_rates=Counter([stream.file_rate]),
                channels=Counter([stream.channels]),
                formats=Counter([stream.format]),
            )
            found.lengths[np.searchsorted(_LENGTHS, stream.seconds, side="right")] = 1
            if not self.chosen[clip]:
                return found
            try:
                crops = stream.blocks(self.samples) if self.config.whole else iter([self.crops[0, clip][0]])
            except SilentClipError as error:
                stream.find_sound(self.samples)
                found.faults.append(self._fault(clip, "silent_crop", error))
                return found
            found.heard = 1
            for crop in crops:
                found.moments = found.moments.merge(Moments.of(self.front_end(crop[None]).numpy()))
            if self.config.whole:
                stream.check_sound(0, stream.length)
        return found


def find_stats(manifest: Manifest, config: StatsConfig) -> Findings:
    """Look at all clips of a manifest.

    Raises:
        ValueError: A setting that makes no sense.
        WorkerError: A process was killed or crashed.
    """
    found = Findings()
    for chunk in map_clips(_Look(manifest, config), len(manifest), what="clips", chunk=_CHUNK, workers=config.workers):
        found.add(chunk)
    return found


def to_dict(found: Findings, manifest: Manifest, config: StatsConfig) -> dict[str, Any]:
    """Put what was found in the form that is written; ``read_stats`` reads it back.

    Raises:
        StatsError: Nothing was found that could normalise.
    """
    if not found.moments.count or not found.moments.squares:
        raise StatsError(f"no mean and std: {_why_none(found, manifest)}")
    edges = (0.0, *_LENGTHS, None)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "manifest": None if config.manifest is None else os.path.abspath(config.manifest),
        "mean": found.moments.mean,
        "std": found.moments.std,
        "sample_rate": config.sample_rate,
        "num_mels": config.num_mels,
        "from": {
            "clips": found.heard,
            "frames": found.moments.count // config.num_mels,
            "whole": config.whole,
            "seconds": config.seconds,
            "seed": config.seed,
        },
        "clips": len(manifest),
        "fine": found.fine,
        **{kind: sum(fault.kind == kind for fault in found.faults) for kind in _FAULTS},
        "hours": found.seconds / 3600,
        "shortest": found.shortest,
        "longest": found.longest,
        "lengths": [
            {"from": edges[i], "below": edges[i + 1], "clips": int(clips)} for i, clips in enumerate(found.lengths)
        ],
        "sample_rates": {str(rate): clips for rate, clips in sorted(found.sample_rates.items())},
        "channels": {str(channels): clips for channels, clips in sorted(found.channels.items())},
        "formats": dict(found.formats.most_common()),
        "faults": [{"path": manifest.path(fault.clip), **fault._asdict()} for fault in found.faults],
    }


def _why_none(found: Findings, manifest: Manifest) -> str:
    if found.heard:
        return "no clip has a frame" if not found.moments.count else "all values are equal"
    if not found.faults:
        return "no clip was heard"
    first = found.faults[0]
    return (
        f"{len(found.faults):,} of {len(manifest):,} clips cannot be used, "
        f"the first is {printable(manifest.path(first.clip))} ({printable(first.reason)})"
    )


def print_report(report: dict[str, Any], names: int = 5) -> None:
    """Print what was found, for a person.

    Args:
        report: What was found, as ``to_dict`` gives it.
        names: How many names to print of each kind of fault.
    """
    console = Console(highlight=False, markup=False)
    console.print(f"{printable(report['manifest'] or 'demo clips')}: {report['clips']:,} clips", soft_wrap=True)
    for kind in _FAULTS:
        faults = [fault for fault in report["faults"] if fault["kind"] == kind]
        if faults:
            console.print(f"{kind.replace('_', ' ')}: {len(faults):,}")
            for fault in faults[:names]:
                console.print(f"  {printable(fault['path'])}: {printable(fault['reason'])}", soft_wrap=True)
            if len(faults) > names:
                console.print(f"  and {len(faults) - names:,} more")
    console.print(
        f"fine: {report['fine']:,}, {report['hours']:.4g} h, of {report['shortest']:.4g} to {report['longest']:.4g} s"
    )
    for name, unit in {"sample_rates": " Hz", "channels": "", "formats": ""}.items():
        counts = ", ".join(f"{clips:,} of {value}{unit}" for value, clips in report[name].items())
        console.print(f"{name.replace('_', ' ')}: {counts}")
    console.print(_draw_histogram(report["lengths"]))
    source = report["from"]
    crops = "cut into crops" if source["whole"] else "a crop each"
    console.print(f"log-mel: mean {report['mean']:.7g}, std {report['std']:.7g}")
    console.print(
        f"of {source['frames']:,} frames of {source['clips']:,} clips, {crops} of {source['seconds']:g} s, "
        f"at {report['sample_rate']:,} Hz with {report['num_mels']} mel bins"
    )


def _draw_histogram(lengths: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for column in ("seconds", "clips"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    filled = [i for i, bar in enumerate(lengths) if bar["clips"]]
    most = max(bar["clips"] for bar in lengths)
    for bar in lengths[filled[0] : filled[-1] + 1]:
        where = f"{bar['from']:,g} up" if bar["below"] is None else f"{bar['from']:,g} to {bar['below']:,g}"
        table.add_row(where, f"{bar['clips']:,}", "#" * math.ceil(_BAR * bar["clips"] / most))
    return table


def _run(config: StatsConfig) -> int:
    """Run the command, and return its exit status."""
    # Before the work, which may take hours.
    if config.out is not None and (config.out.is_dir() or not os.access(config.out.parent, os.W_OK)):
        raise OSError(f"{config.out} cannot be written, expected a file in a folder that is there")
    manifest = read_manifest(config.manifest, allow_outside=config.allow_outside)
    report = to_dict(find_stats(manifest, config), manifest, config)
    if config.out is not None:
        with replacing(config.out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report, config.names)
    if config.out is None:
        print("--out FILE keeps them; then train with --stats FILE")
    else:
        data = "" if config.manifest is None else f" --data {shlex.quote(config.manifest)}"
        print(f"to normalise with them: python -m audiomae.pretrain{data} --stats {shlex.quote(str(config.out))}")
    return 0 if report["fine"] == report["clips"] else 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    try:
        status = _run(tyro.cli(StatsConfig, args=arguments, prog=f"python -m {PROG}", description=__doc__))
    except (ValueError, OSError, WorkerError) as error:
        print(f"{PROG}: error: {printable(describe(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(status)


if __name__ == "__main__":
    main()

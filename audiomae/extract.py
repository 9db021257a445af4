"""Extract embeddings of sound files of any length: one vector a clip, and with --frames one for each 160 ms or so.

    python -m audiomae.extract dog.wav more-clips/ --checkpoint weights.safetensors --out embeddings.npz
    python -m audiomae.extract clips.csv --checkpoint weights.safetensors --out embeddings.parquet --layer 9 --frames

FILES are sound files, folders of them, or manifests (.csv, .json). A NumPy file holds one row a clip in "paths",
"starts" and "seconds" (the part of the file that the clip is), and "clip" (clips, D). With --frames, the time steps of
all clips follow each other in "frames" (time steps, D) and "times" (their centres, in seconds from the clip's start);
those of clip i are offsets[i] to offsets[i + 1]. A Parquet file has the same columns, path, start, seconds, clip,
frames and times, one row a clip; it is written while clips come, so that any number of them fits the memory.

A clip that cannot be read is named in a line and left out; "skipped" and "skipped_reasons" tell of it, in Parquet the
file's metadata of these names, as JSON.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from audiomae.atomic import replacing
from audiomae.checkpoints import load_encoder
from audiomae.data.windowed import ClipWindows, HeardClip, UnreadableClip, hear_clips, list_clips
from audiomae.embedding import WindowEmbedder
from audiomae.training.command import run_on_files, share_processors
from audiomae.training.config import autocast_dtype
from audiomae.training.distributed import Ranks

PROG = "audiomae.extract"
ROW_GROUP = 64 << 20
"""Bytes of embeddings that are collected before they are written to a Parquet file."""


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of the command."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Sound files, folders of them, or manifests."""
    checkpoint: str
    """Model with an encoder, pre-trained or fine-tuned: a file or hub id."""
    out: Path
    """Where to write, a name that ends in .npz or .parquet."""

    layer: int | None = None
    """Block whose output is embedded: 1 is the first, -1 the last. None: the encoder's output, after its final norm if
    it has one."""
    frames: bool = False
    """Also store an embedding of each time step."""
    allow_outside: bool = False
    """Allow paths in manifests that lead out of the manifest's folder."""

    batch_size: int = 16
    """Windows at a time, of as many clips as it takes."""
    workers: int | None = None
    """Processes that read clips. None: up to 8 with a GPU, 1 on a CPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast: auto is bf16 on GPUs and fp32 on CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes a GPU where there is one."""


class Row(NamedTuple):
    """Embeddings of a clip.

    Attributes:
        path: Its file.
        start: Where in it the clip starts, s.
        seconds: Its length, s.
        clip: ``(D,)`` float32.
        frames: ``(N, D)`` float32, and
        times: ``(N,)`` float64, with --frames alone.
    """

    path: str
    start: float
    seconds: float
    clip: np.ndarray
    frames: np.ndarray | None = None
    times: np.ndarray | None = None


class Writer(Protocol):
    """Takes embeddings, one clip after the other."""

    def add(self, row: Row) -> None:
        """Take the next clip."""

    def finish(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Write what is left, and the path and reason of each clip that was skipped."""


class NumpyWriter:
    """Collects embeddings, and writes one array for each column.

    Args:
        path: Where to write.
    """

    def __init__(self, path: Path):
        self._path = path
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Take the next clip."""
        self._rows.append(row)

    def finish(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Write all."""
        rows = self._rows
        arrays: dict[str, Any] = {
            "paths": np.array([row.path for row in rows], dtype=np.str_),
            "starts": np.array([row.start for row in rows]),
            "seconds": np.array([row.seconds for row in rows]),
            "clip": np.stack([row.clip for row in rows]),
            "skipped": np.array([path for path, _ in skipped], dtype=np.str_),
            "skipped_reasons": np.array([reason for _, reason in skipped], dtype=np.str_),
        }
        frames = [row.frames for row in rows if row.frames is not None]
        if frames:
            arrays["frames"] = np.concatenate(frames)
            arrays["times"] = np.concatenate([row.times for row in rows if row.times is not None])
            arrays["offsets"] = np.cumsum([0, *map(len, frames)])
        with self._path.open("wb") as file:  # to a path, NumPy would add an ending
            np.savez(file, **arrays)


class ParquetWriter:
    """Writes embeddings to a Parquet file while they come.

    Args:
        path: Where to write.
        dim: Width of an embedding.
        frames: Whether clips have embeddings of time steps.
    """

    def __init__(self, path: Path, dim: int, frames: bool):
        import pyarrow
        import pyarrow.parquet

        self._arrow, self._dim = pyarrow, dim
        embedding = pyarrow.list_(pyarrow.float32(), dim)
        fields = {"path": pyarrow.string(), "start": pyarrow.float64(), "seconds": pyarrow.float64(), "clip": embedding}
        if frames:
            fields |= {"frames": pyarrow.list_(embedding), "times": pyarrow.list_(pyarrow.float64())}
        self._schema = pyarrow.schema(list(fields.items()))
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._rows: list[Row] = []
        self._bytes = 0

    def add(self, row: Row) -> None:
        """Take the next clip."""
        self._rows.append(row)
        self._bytes += row.clip.nbytes + (0 if row.frames is None else row.frames.nbytes)
        if self._bytes >= ROW_GROUP:
            self._flush()

    def finish(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Write what is left and close the file."""
        self._flush()
        columns = {"skipped": [path for path, _ in skipped], "skipped_reasons": [reason for _, reason in skipped]}
        self._writer.add_key_value_metadata({name: json.dumps(column) for name, column in columns.items()})
        self._writer.close()

    def _flush(self) -> None:
        """Write the rows at hand as a row group."""
        rows, arrow = self._rows, self._arrow
        # Parquet's text is UTF-8, which names of files need not be.
        columns = {
            "path": arrow.array([row.path.encode(errors="backslashreplace").decode() for row in rows], arrow.string()),
            "start": arrow.array([row.start for row in rows], arrow.float64()),
            "seconds": arrow.array([row.seconds for row in rows], arrow.float64()),
            "clip": self._embeddings([row.clip[None] for row in rows]),
        }
        if "frames" in self._schema.names:
            frames = [row.frames for row in rows if row.frames is not None]
            times = [row.times for row in rows if row.times is not None]
            offsets = arrow.array(np.cumsum([0, *map(len, frames)]), arrow.int32())
            columns["frames"] = arrow.ListArray.from_arrays(offsets, self._embeddings(frames))
            columns["times"] = arrow.ListArray.from_arrays(offsets, np.concatenate([np.zeros(0), *times]))
        self._writer.write_table(arrow.table(columns, self._schema))
        self._rows, self._bytes = [], 0

    def _embeddings(self, parts: Sequence[np.ndarray]) -> Any:
        """Column of embeddings from parts ``(any, D)``."""
        values = np.concatenate([np.zeros((0, self._dim), np.float32), *parts]).ravel()
        return self._arrow.FixedSizeListArray.from_arrays(values, self._dim)


@dataclass(frozen=True)
class Job:
    """Everything that an extraction needs.

    Attributes:
        clips: The windows of all clips.
        embedder: Embeds them.
        workers: Processes that read.
        precision: Of autocast; float32 is none.
    """

    clips: ClipWindows
    embedder: WindowEmbedder
    workers: int
    precision: torch.dtype


def build(config: ExtractConfig, ranks: Ranks) -> Job:
    """Find the clips and load the encoder, so that wrong settings are found before any work.

    Raises:
        ValueError: Settings that make no sense, or a checkpoint, folder or manifest that does not serve.
        OSError: A checkpoint or manifest that is missing or cannot be read, or a folder that cannot be made.
    """
    if not config.files:
        raise ValueError("no files given, expected sound files, folders or manifests")
    if config.batch_size < 1:
        raise ValueError(f"batch_size is {config.batch_size}, expected at least 1")
    check_out(config.out)
    manifest = list_clips(config.files, allow_outside=config.allow_outside)
    encoder_config, encoder = load_encoder(config.checkpoint)
    embedder = WindowEmbedder(encoder_config, encoder.to(ranks.device), config.layer)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    return Job(
        ClipWindows(manifest, embedder.windows),
        embedder,
        share_processors(config.workers, ranks),
        autocast_dtype(config.precision, ranks.device),
    )


def check_out(out: Path) -> None:
    """Raise ValueError unless the output can be written, as far as its name tells."""
    if out.suffix not in (".npz", ".parquet"):
        raise ValueError(f"out is {out}, expected a name that ends in .npz or .parquet")
    if out.is_dir():
        raise ValueError(f"out is {out}, which is a folder: expected a file")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(f"out is {out}, which takes pyarrow: pip install 'audiomae[parquet]', or write an .npz")


def embed_windows(config: ExtractConfig, job: Job, windows: Tensor, lengths: Tensor) -> list[Tensor]:
    """Embed windows ``(B, samples)`` of which ``lengths (B,)`` are their own.

    Returns:
        The time steps of each that are not padding, ``(N, D)``, or without --frames their sum, ``(1, D)``.
    """
    embedder = job.embedder
    with torch.autocast(embedder.device.type, job.precision, enabled=job.precision != torch.float32):
        frames = embedder(windows, lengths).cpu()
    own = [
        window[: embedder.windows.num_steps(length)] for window, length in zip(frames, lengths.tolist(), strict=True)
    ]
    return [window.clone() if config.frames else window.sum(dim=0, keepdim=True) for window in own]


def make_row(config: ExtractConfig, job: Job, heard: HeardClip) -> Row:
    """Put the windows of a clip together."""
    manifest, windows = job.clips.manifest, job.embedder.windows
    steps, embeddings = windows.num_steps(heard.total), torch.cat(heard.results)
    row = Row(
        manifest.path(heard.clip),
        manifest.segment(heard.clip)[0],
        heard.total / windows.sample_rate,
        (embeddings.sum(dim=0) / steps).numpy(),
    )
    if config.frames:
        row = row._replace(frames=embeddings.numpy(), times=windows.times(steps).numpy())
    return row


def run(config: ExtractConfig, job: Job) -> int:
    """Embed all clips; return how many of them failed, each of which is named in a line.

    Raises:
        ValueError: No clip that can be read.
        OSError: The output cannot be written.
    """
    console, manifest = Console(stderr=True), job.clips.manifest
    columns = (TextColumn("clips"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    skipped: list[tuple[str, str]] = []
    done, seconds = 0, 0.0
    with (
        replacing(config.out) as temporary,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        writer: Writer = (
            NumpyWriter(temporary)
            if config.out.suffix == ".npz"
            else ParquetWriter(temporary, job.embedder.dim, config.frames)
        )
        heard = hear_clips(
            job.clips, partial(embed_windows, config, job), batch_size=config.batch_size, workers=job.workers
        )
        for clip in progress.track(heard, total=len(manifest)):
            if isinstance(clip, UnreadableClip):
                skipped.append((manifest.path(clip.clip), clip.reason))
                print(f"{PROG}: error: {clip.reason}", file=sys.stderr, flush=True)
                continue
            row = make_row(config, job, clip)
            writer.add(row)
            done, seconds = done + 1, seconds + row.seconds
        if not done:
            raise ValueError(f"none of the {len(manifest)} clips could be read, so {config.out} is not written")
        writer.finish(skipped)
    print(f"{done} clips of {seconds:.1f} s in all, {job.embedder.dim} numbers each: {config.out}")
    if skipped:
        print(f"{PROG}: {len(skipped)} of {len(manifest)} clips could not be read", file=sys.stderr)
    return len(skipped)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Wrong settings end it with one line and exit status 2. A clip that cannot be read is named in a line, the others are
    embedded, and the exit status is 1.
    """
    parse = partial(tyro.cli, ExtractConfig, args=arguments, prog=f"python -m {PROG}", description=__doc__)
    run_on_files(PROG, parse, lambda config, ranks: run(config, build(config, ranks)))


if __name__ == "__main__":
    main()

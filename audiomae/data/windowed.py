"""Clips of any length as windows: read in order, sent through a model in batches over all clips, and joined again."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from audiomae.data.clips import read_waveform
from audiomae.data.manifests import Clip, Manifest, read_manifest
from audiomae.data.sound_files import ClipError
from audiomae.windows import Windows


def list_clips(sources: Iterable[str], *, allow_outside: bool = False) -> Manifest:
    """List sound files, all those of folders, and the clips of manifests; whether they can be read is seen later.

    Args:
        sources: Anything that is neither a folder nor ends in .csv or .json counts as a sound file.
        allow_outside: Whether manifests may name files outside their folders.

    Raises:
        FileNotFoundError: For no such manifest.
        ManifestError: For no sources, a folder without sound files, or a manifest that is malformed, without clips, or
            names a file outside its folder.
    """

    def clips() -> Iterator[Clip]:
        for source in sources:
            if os.path.isdir(source) or Path(source).suffix.lower() in (".csv", ".json"):
                manifest = read_manifest(source, allow_outside=allow_outside)
                for clip in range(len(manifest)):
                    yield manifest.path(clip), manifest.labels(clip), *manifest.segment(clip)
            else:
                yield source, ()

    return Manifest(clips(), root="")


class Window(NamedTuple):
    """A window of a clip.

    Attributes:
        clip: Number of the clip in its manifest.
        waveform: ``(at most windows.samples,)`` float32, less where the clip ends.
        total: Samples of the clip; None before its last window.
    """

    clip: int
    waveform: Tensor
    total: int | None


class UnreadableClip(NamedTuple):
    """A clip that cannot be read, at all or to its end.

    Attributes:
        clip: Number of the clip in its manifest.
        reason: Names the file and what is wrong.
    """

    clip: int
    reason: str


class ClipWindows(IterableDataset[Window | UnreadableClip]):
    """Windows of all clips, one clip after the other; reading workers share out the clips.

    A clip is read window by window, so that its length does not matter. After an ``UnreadableClip`` no more windows
    of that clip come.

    Args:
        manifest: The clips.
        windows: Where to cut.
    """

    def __init__(self, manifest: Manifest, windows: Windows):
        self.manifest, self.windows = manifest, windows

    def __iter__(self) -> Iterator[Window | UnreadableClip]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for clip in range(first, len(self.manifest), step):
            try:
                yield from self._read(clip)
            except (ClipError, ValueError) as error:  # of a file, or of a start beyond its end
                yield UnreadableClip(clip, str(error))

    def _read(self, clip: int) -> Iterator[Window]:
        path, (start, duration), windows = self.manifest.path(clip), self.manifest.segment(clip), self.windows
        rate = windows.sample_rate
        begin, limit = round(start * rate), None if duration is None else round(duration * rate)
        if limit == 0:
            raise ClipError(f"{path}: a part of {duration:.4g} s is less than a sample at {rate} Hz")
        # So much from a window's start on, and there is a time step for another window after it.
        goes_on = windows.hop + windows.half_patch
        done = 0
        while True:
            count = max(windows.samples, goes_on)
            if limit is not None:
                count = min(count, limit - done)
            waveform = read_waveform(path, rate, (begin + done) / rate, count / rate)
            last = len(waveform) < goes_on
            yield Window(clip, waveform[: windows.samples], done + len(waveform) if last else None)
            if last:
                return
            done += windows.hop


class HeardClip(NamedTuple):
    """What a model made of a clip.

    Attributes:
        clip: Number of the clip in its manifest.
        results: One of each window.
        total: Samples of the clip.
    """

    clip: int
    results: list[Tensor]
    total: int


def hear_clips(
    dataset: ClipWindows,
    model: Callable[[Tensor, Tensor], Sequence[Tensor]],
    *,
    batch_size: int,
    workers: int = 0,
) -> Iterator[HeardClip | UnreadableClip]:
    """Send all clips through a model, and give what it made of each, in their order.

    All results of a clip are in memory until its last one is there. With several workers, which read as many clips at
    the same time, so are those of later clips: up to ``workers - 1`` results for each window of the longest clip.

    Args:
        dataset: The clips.
        model: From windows ``(B, samples)``, zero-padded, and their lengths without padding ``(B,)`` int64 to a result
            for each.
        batch_size: Windows at a time, of as many clips as it takes.
        workers: Processes that read; 0 reads in this one.
    """
    # Each worker reads a batch ahead, lest reading wait while the model computes.
    prefetch = batch_size if workers else None
    stream = iter(DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=prefetch))
    hearing: dict[int, HeardClip] = {}
    done: dict[int, HeardClip | UnreadableClip] = {}
    next_clip = 0
    while batch := list(islice(stream, batch_size)):
        windows = [item for item in batch if isinstance(item, Window)]
        for window, result in zip(windows, _hear(windows, model, dataset.windows), strict=True):
            heard = hearing.setdefault(window.clip, HeardClip(window.clip, [], 0))
            heard.results.append(result)
            if window.total is not None:
                done[window.clip] = hearing.pop(window.clip)._replace(total=window.total)
        for item in batch:
            if isinstance(item, UnreadableClip):
                hearing.pop(item.clip, None)
                done[item.clip] = item
        while next_clip in done:
            yield done.pop(next_clip)
            next_clip += 1


def _hear(
    batch: Sequence[Window], model: Callable[[Tensor, Tensor], Sequence[Tensor]], windows: Windows
) -> Sequence[Tensor]:
    if not batch:
        return []
    padded = [F.pad(window.waveform, (0, windows.samples - len(window.waveform))) for window in batch]
    return model(torch.stack(padded), windows.heard(torch.tensor([len(window.waveform) for window in batch])))

"""The loader against libsndfile alone, on one thread, with all files in the page cache: storage is not measured.

libsndfile reads the frames as float32 and no more; the loader also draws the crop and the gain, averages channels, and
checks what it has read. What a worker process adds, which collates batches and hands them over, a third row has.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiomae.data import ClipBatches, ClipDataset, ClipLoader, Manifest, Replacing
from bench.compare import Plan, compare
from bench.provenance import provenance
from bench.rows import Row
from bench.turns import Call, Laps, Mark

RATE, SECONDS = 16_000, 10
FILES, BATCH = 32, 8


def draw_sound(draw: np.random.Generator) -> np.ndarray:
    """Ten notes that decay, each of some harmonics, in soft noise: (samples,), below full scale."""
    note = np.arange(SECONDS * RATE // 10) / RATE
    pitches = draw.uniform(80, 800, 10)
    notes = [
        sum(np.sin(2 * np.pi * pitch * n * note + draw.uniform(0, 6)) / n for n in range(1, 8)) * np.exp(-3 * note)
        for pitch in pitches
    ]
    return 0.2 * np.concatenate(notes) + 0.003 * draw.standard_normal(SECONDS * RATE)


def write_sounds(folder: Path, task: str, channels: int) -> Manifest:
    """Write 16-bit files, the channels of one about alike."""
    draw = np.random.default_rng(0)
    for number in range(FILES):
        sound = draw_sound(draw)
        samples = np.stack([sound, *(0.7 * sound + 0.1 * draw_sound(draw) for _ in range(channels - 1))], axis=1)
        soundfile.write(folder / f"{number}.{task.lower()}", samples, RATE, subtype="PCM_16")
    return Manifest(((path.name, ()) for path in sorted(folder.iterdir())), root=folder)


def find_difference(manifest: Manifest) -> str | None:
    """Where the loader, without crop and gain, gives other values than libsndfile, or None."""
    clips = ClipDataset(manifest, RATE, SECONDS * RATE, gain_db=0, crop="start")
    for number in range(len(manifest)):
        expected, _ = soundfile.read(manifest.path(number), dtype="float32", always_2d=True)
        if not np.array_equal(clips[0, number][0].numpy(), expected.mean(axis=1)):
            return f"clip {number} differs from what libsndfile reads"
    return None


def calls_on(manifest: Manifest) -> dict[str, Call]:
    """Make calls that read every clip once, in an order that changes from turn to turn and is the same for all."""
    batches = ClipBatches(len(manifest), BATCH)
    clips = ClipDataset(manifest, RATE, SECONDS * RATE)
    # The worker starts on an epoch when it is asked for one, and has then done all of the one before: no other turn
    # has it at work.
    loader = ClipLoader(Replacing(clips), SECONDS * RATE, batches, workers=1)

    def pairs_of(turn: int) -> Sequence[tuple[int, int]]:
        batches.set_epoch(turn)
        return list(chain.from_iterable(batches))

    def libsndfile(turn: int, mark: Mark) -> None:
        for _, clip in pairs_of(turn):
            soundfile.read(manifest.path(clip), dtype="float32")

    def dataset(turn: int, mark: Mark) -> None:
        for pair in pairs_of(turn):
            clips[pair]

    def one_worker(turn: int, mark: Mark) -> None:
        batches.set_epoch(turn)
        for _ in loader:
            pass

    return {"libsndfile": libsndfile, "ClipDataset": dataset, "ClipLoader, 1 worker": one_worker}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("task", ["WAV", "FLAC"])
def test_loader(plan: Plan, rows: list[Row], tmp_path: Path, task: str, channels: int) -> None:
    manifest = write_sounds(tmp_path, task, channels)
    cpu = torch.device("cpu")
    about = Row(
        "loader",
        task,
        "ClipDataset",
        "libsndfile",
        shape={"seconds": SECONDS, "channels": channels},
        about=provenance(cpu),
    )
    about.wrong = find_difference(manifest)
    if about.wrong:
        rows.append(about)
        pytest.fail(about.wrong)
    for row in compare(plan, about, calls_on(manifest), Laps(cpu, kernels=False), budget_s=10):
        assert row.p50_ms
        rows.append(replace(row, facts={"clips/s": 1e3 * FILES / row.p50_ms}))

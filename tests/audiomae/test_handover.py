"""Batches that processes hand over in slots: the same as those of this process, and untouched while they are used."""

import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from audiomae.data import ClipBatches, ClipError, ClipLoader, Manifest, Replacing

CLIPS, SAMPLES = 23, 50


class Sample(NamedTuple):
    waveform: Tensor
    pair: Tensor
    weight: Tensor


class Visits(Dataset[Sample]):
    """A waveform that tells its visit; the fourth clip cannot be read."""

    def __init__(self, named: bool) -> None:
        self.named = named
        self.manifest = Manifest([(f"{number}.wav", ()) for number in range(CLIPS)])

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, index):
        epoch, clip = index
        if clip == 3:
            raise ClipError("3.wav: is no sound")
        sample = torch.full((SAMPLES,), float(1000 * epoch + clip)), torch.tensor([epoch, clip]), torch.tensor(clip / 7)
        return Sample(*sample) if self.named else sample[:2]


def load(workers: int, splits: int = 1, epochs: int = 3, named: bool = True, **options):
    batches = ClipBatches(CLIPS, 7, seed=5, world_size=2, rank=1, splits=splits)
    loader = ClipLoader(Replacing(Visits(named)), SAMPLES, batches, workers=workers, **options)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        yield from loader


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
def test_processes_give_the_batches_of_this_one(workers: int, named: bool) -> None:
    for ours, theirs in zip(load(0, named=named), load(workers, named=named), strict=True):
        assert ours.unread == theirs.unread
        if named:
            assert type(theirs.data) is Sample
        for one, other in zip(ours.data, theirs.data, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_the_micro_batches_of_a_step_stay_while_further_ones_are_read(splits: int) -> None:
    whole = [batch.data for batch in load(0, splits)]
    stream = load(1, splits)
    taken = 0
    while step := list(islice(stream, splits)):
        time.sleep(0.02)  # the process reads on
        for batch in step:
            torch.testing.assert_close(batch.data.waveform, whole[taken].waveform, rtol=0, atol=0)
            taken += 1
    assert taken == len(whole)


def test_a_slot_is_used_again_and_not_before() -> None:
    addresses = [batch.data.waveform.data_ptr() for batch in load(1, epochs=4)]
    assert len(set(addresses)) == 4  # two on their way, one in use, one more
    assert all(len(set(addresses[i : i + 4])) == 4 for i in range(len(addresses) - 3))


def test_without_fork_batches_travel_as_they_always_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    for ours, theirs in zip(load(0), load(1), strict=True):
        assert ours.unread == theirs.unread
        torch.testing.assert_close(ours.data.waveform, theirs.data.waveform, rtol=0, atol=0)


def test_pinning_copies_out_of_the_slot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    loader = ClipLoader(Replacing(Visits(True)), SAMPLES, ClipBatches(CLIPS, 7), workers=1)
    for in_slot, whole in zip(loader._loader, load_whole(), strict=True):
        pinned = in_slot.data.pin_memory()
        assert type(pinned) is Sample
        assert pinned.waveform.data_ptr() != in_slot.data.take().waveform.data_ptr()
        torch.testing.assert_close(pinned.waveform, whole.waveform, rtol=0, atol=0)


def load_whole():
    for batch in ClipLoader(Replacing(Visits(True)), SAMPLES, ClipBatches(CLIPS, 7), workers=0):
        yield batch.data

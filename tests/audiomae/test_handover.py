"""Batches that processes hand over in slots: the same as those of this process, and untouched while they are used."""

import re
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from audiomae.data import ClipBatches, ClipError, ClipLoader, Manifest, Replacing, handover
from audiomae.data.handover import _Slots

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
    assert len(set(addresses)) == 5  # two on their way, two of an iteration that was left, one in use
    assert all(len(set(addresses[i : i + 5])) == 5 for i in range(len(addresses) - 4))


@pytest.mark.parametrize("splits", [2, 3])
def test_micro_batches_stay_where_an_iteration_is_left_and_another_one_begun(splits: int) -> None:
    batches = ClipBatches(CLIPS, 7, splits=splits)
    loader = ClipLoader(Replacing(Visits(True)), SAMPLES, batches, workers=1)
    step = list(islice(loader, splits))
    whole = [batch.data.waveform.clone() for batch in step]
    batches.set_epoch(1)
    further = iter(loader)
    for taken in range(1, splits):
        next(further)
        time.sleep(0.05)  # the process reads on
        for batch, waveform in zip(step[taken:], whole[taken:], strict=True):
            torch.testing.assert_close(batch.data.waveform, waveform, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (SAMPLES + 1,), (1, SAMPLES)])
def test_a_waveform_of_another_shape_is_refused(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "get_worker_info", lambda: SimpleNamespace(id=0))
    monkeypatch.setattr(Visits, "__getitem__", lambda self, index: (torch.zeros(shape), torch.tensor(index)))
    slots = _Slots(Replacing(Visits(False)), (1, 2, 7, SAMPLES))
    error = f"clip 5 has a waveform of shape {shape}, expected (50,)"
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        slots.__getitems__([(0, 5)])


def test_a_batch_that_is_larger_than_its_slot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "get_worker_info", lambda: SimpleNamespace(id=0))
    slots = _Slots(Replacing(Visits(True)), (1, 2, 7, SAMPLES))
    slots.__getitems__([(0, clip) for clip in range(7)])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        slots.__getitems__([(0, clip) for clip in range(8)])


def handler(number: int, frame: object) -> None:
    """A handler of SIGCHLD, as a program may have one."""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which no loader had processes yet."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("before", [handler, signal.SIG_DFL, signal.SIG_IGN])
def test_the_handler_of_dead_processes_stays_what_it_was(before: Any) -> None:
    signal.signal(signal.SIGCHLD, before)
    loader = ClipLoader(Replacing(Visits(True)), SAMPLES, ClipBatches(CLIPS, 7), workers=1)
    for _ in range(2):
        next(iter(loader))
        assert signal.getsignal(signal.SIGCHLD) is before


@pytest.mark.usefixtures("fresh")
def test_the_handler_that_another_loader_left_is_taken_away() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    other = iter(DataLoader([0, 1], num_workers=1))
    assert signal.getsignal(signal.SIGCHLD).__module__ == signal_handling.__name__
    next(iter(ClipLoader(Replacing(Visits(True)), SAMPLES, ClipBatches(CLIPS, 7), workers=1)))
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    assert list(other) == [0, 1]


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

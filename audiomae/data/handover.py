"""Batches of clips from reading processes, handed over in memory that is used again and again.

A DataLoader makes shared memory for every tensor of every batch. Fresh pages cost more than reading a clip of 16-bit
WAV does, each tensor travels as a file descriptor through a socket, and containers often have no more than 64 MiB for
such memory. Here each process fills slots that were there before it was started, one after the other.
"""

import mmap
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from audiomae.data.processes import begin
from audiomae.data.replacing import Batch, Replacing, Unread, collate_visits
from audiomae.data.sampling import ClipBatches

_PREFETCH = 2  # batches that a process reads ahead, DataLoader's own number


class _Slots(Dataset[Batch]):
    """Waveforms of batches, ``(processes, slots, clips, samples)`` float32, in memory that processes share.

    Args:
        clips: What they are of.
        shape: Of all of it.
    """

    def __init__(self, clips: Replacing[Any], shape: tuple[int, int, int, int]):
        self._clips = clips
        # Anonymous memory, which a process that is forked shares: it needs no file in /dev/shm, whose size is limited.
        self._memory = mmap.mmap(-1, 4 * torch.Size(shape).numel())
        self.waveforms = torch.frombuffer(self._memory, dtype=torch.float32).view(shape)
        self._filled = 0

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> Batch:
        """Read the clips of a batch into the next slot of this process."""
        info = get_worker_info()
        assert info is not None
        slot = info.id, self._filled % self.waveforms.shape[1]
        self._filled += 1
        rows = self.waveforms[slot][: len(pairs)]
        read = [self._read(pair, row) for pair, row in zip(pairs, rows, strict=True)]
        kinds, others, unread = zip(*read, strict=True)
        make = kinds[0] if kinds[0] is tuple else kinds[0]._make
        # Arrays are small here and travel with the message itself; tensors would not.
        arrays = [torch.stack(part).numpy() for part in zip(*others, strict=True)]
        return Batch(_InSlot(id(self), slot, len(kinds), make, arrays), tuple(chain.from_iterable(unread)))

    def _read(
        self, pair: tuple[int, int], row: Tensor
    ) -> tuple[type[tuple[Any, ...]], tuple[Tensor, ...], tuple[Unread, ...]]:
        """Read a clip, put its waveform into a row, and return its type, what else it has, and what was not read."""
        sample, unread = self._clips[pair]
        if sample[0].shape != row.shape:  # one that is shorter could be spread over the row
            raise ValueError(
                f"clip {pair[1]} has a waveform of shape {tuple(sample[0].shape)}, expected {tuple(row.shape)}"
            )
        # At once, so that the memory of one waveform serves for all and stays in the processor's cache: to give memory
        # for eight back and get it anew takes nearly as long as reading them does.
        row.copy_(sample[0])
        return type(sample), sample[1:], unread


_ALL_SLOTS: WeakValueDictionary[int, _Slots] = WeakValueDictionary()


@dataclass(frozen=True)
class _InSlot:
    """The samples of a batch, of which the waveforms stayed where they are.

    Attributes:
        slots: Key of the ``_Slots``.
        slot: Process and slot.
        clips: How many they are.
        make: Makes a sample's type of the tensors.
        others: What there is besides waveforms.
    """

    slots: int
    slot: tuple[int, int]
    clips: int
    make: Callable[[Sequence[Tensor]], Any]
    others: list[Any]

    def take(self) -> Any:
        """The batch, whose waveforms are the slot itself."""
        waveforms = _ALL_SLOTS[self.slots].waveforms[self.slot][: self.clips]
        return self.make([waveforms, *map(torch.from_numpy, self.others)])

    def pin_memory(self) -> Any:
        """The batch in page-locked memory, as a DataLoader asks for it in a thread of its own."""
        whole = self.take()
        return self.make([tensor.pin_memory() for tensor in whole])


def _as_it_is(batch: Batch) -> Batch:
    """Do nothing: a batch is put together where its clips are read."""
    return batch


class ClipLoader:
    """Loads the batches of a batch sampler, with processes that live as long as it does.

    A batch stays as it is until as many further ones were taken as ``batches.splits``: the micro-batches of a step can
    be used together.

    Args:
        clips: The clips; a sample is a tuple of tensors that begins with a waveform.
        samples: Length of the waveforms.
        batches: Which clips a batch holds.
        workers: Processes that read; 0 reads in this one.
        worker_init: Called in each of them with its number.
        pin_memory: Give batches in page-locked memory, for a GPU.
    """

    def __init__(
        self,
        clips: Replacing[Any],
        samples: int,
        batches: ClipBatches,
        *,
        workers: int,
        worker_init: Callable[[int], None] | None = None,
        pin_memory: bool = False,
    ):
        self._slots: _Slots | None = None
        visits: Dataset[Any] = clips
        collate: Callable[[Any], Batch] = collate_visits
        if workers and multiprocessing.get_start_method() == "fork":
            # Those in use, and those on their way: twice as many where an iteration is left before its end, since a
            # process fills what it was asked for, and then as much for the next iteration.
            slots = 2 * _PREFETCH + batches.splits
            visits = self._slots = _Slots(clips, (workers, slots, batches.largest_part, samples))
            _ALL_SLOTS[id(self._slots)] = self._slots
            collate = _as_it_is
        self._loader = DataLoader(
            visits,
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            persistent_workers=workers > 0,
            collate_fn=collate,
            worker_init_fn=worker_init if workers else None,
            pin_memory=pin_memory,
            # Workers draw nothing from it, but starting them would take a number from the generator that dropout uses.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in begin(self._loader):
            yield batch._replace(data=batch.data.take()) if isinstance(batch.data, _InSlot) else batch

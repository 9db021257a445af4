"""Work on all clips of a manifest, in processes, with a progress bar."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from audiomae.data.processes import begin

T = TypeVar("T")

_OUT_OF_MEMORY = "a process that needs more memory than there is ends so"


class WorkerError(RuntimeError):
    """A process that worked on clips is gone."""


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))


def printable(text: str) -> str:
    """Make text of a file's name that any terminal can show: control characters and foreign bytes become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def describe(error: Exception) -> str:
    """Say what an error says, without a number where it says more than the system does."""
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return error.strerror
    return str(error)


def map_clips(
    work: Callable[[range], T], num_clips: int, *, what: str, chunk: int, workers: int | None = None
) -> Iterator[T]:
    """Give all clips to ``work``, some at a time, and yield what it returns, in the clips' order.

    Args:
        work: From numbers of clips to a result that can be pickled; computes with one thread.
        num_clips: How many clips there are.
        what: Stands before the progress bar.
        chunk: Clips at a time; which ones depends on nothing else.
        workers: Processes; 0 works in this one, None is one for each processor.

    Raises:
        WorkerError: A process was killed or crashed.
        Exception: What ``work`` raised.
    """
    workers = min(processors() if workers is None else workers, -(-num_clips // chunk))
    loader = DataLoader(
        _Chunks(work, num_clips, chunk),
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        in_order=False,  # one long clip holds up nobody
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # starting processes would take a number from the default one
    )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    waiting: dict[int, T] = {}
    threads, first = torch.get_num_threads(), 0
    torch.set_num_threads(1)
    try:
        others = set(multiprocessing.active_children())
        results = begin(loader)  # before the bar, which has a thread: processes are forked
        processes = set(multiprocessing.active_children()) - others
        with Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=num_clips)
            for number, clips, result in results:
                # The loader looks only once the others have nothing more to give; until then all of it would wait here.
                if dead := [str(process.pid) for process in processes if process.exitcode is not None]:
                    raise WorkerError(f"process {', '.join(dead)} exited unexpectedly; {_OUT_OF_MEMORY}")
                progress.advance(task, clips)
                waiting[number] = result
                while first in waiting:
                    yield waiting.pop(first)
                    first += 1
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise WorkerError(f"{error}; {_OUT_OF_MEMORY}") from error
    finally:
        torch.set_num_threads(threads)


class _Chunks(Dataset[tuple[int, int, T]], Generic[T]):
    """Numbers of chunks, how many clips they hold, and what ``work`` makes of them."""

    def __init__(self, work: Callable[[range], T], num_clips: int, chunk: int):
        self.work, self.num_clips, self.chunk = work, num_clips, chunk

    def __len__(self) -> int:
        return -(-self.num_clips // self.chunk)

    def __getitem__(self, number: int) -> tuple[int, int, T]:
        clips = range(number * self.chunk, min((number + 1) * self.chunk, self.num_clips))
        return number, len(clips), self.work(clips)


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the parent, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

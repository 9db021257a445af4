"""SIGTERM and SIGINT: a run stops after the step that it is in, and what reads for it lives until then."""

import os
import signal
import threading
from types import FrameType
from typing import Self

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run that a signal stopped, its state saved.

    Args:
        number: Number of the signal.
        step: Steps taken.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, whose state is saved")
        self.number = number


class StopRequest:
    """Whether the run was asked to stop, within a ``with`` statement; a second SIGINT interrupts at once.

    Attributes:
        number: Number of the signal that asked, 0 before any.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Self:
        # Python lets the main thread alone set handlers; a run in another one is stopped by whoever started it.
        self._before = (
            {number: signal.signal(number, self._receive) for number in STOPPING}
            if threading.current_thread() is threading.main_thread()
            else {}
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def shield_worker(worker: int) -> None:
    """Let a process that reads clips outlive signals that are sent to a whole group of processes.

    Ctrl-C, torchrun and SLURM signal these processes too, and without them the step that is under way could not be
    ended. Their parent alone can still terminate them.

    Args:
        worker: Its number, as a DataLoader gives it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

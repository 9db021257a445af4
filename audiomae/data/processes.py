"""Reading processes of a DataLoader, of which one that dies is an error of the loader alone."""

import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling


def begin(loader: DataLoader[Any]) -> Iterator[Any]:
    """Begin an iteration, and leave the handler of SIGCHLD as it was.

    PyTorch's handler raises where the main thread happens to be, and what is computed there may take the error for its
    own. The loader sees within 5 s of waiting for a batch by itself that a process died.
    """
    if not loader.num_workers or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    stream = iter(loader)
    # Another loader may have set PyTorch's own, once and for all loaders; what it replaced then is unknown.
    is_pytorchs = getattr(before, "__module__", None) == signal_handling.__name__
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None or is_pytorchs else before)
    return stream

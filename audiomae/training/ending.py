"""How a training run ends: what is told, and the exit status."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from audiomae.atomic import NoSpaceError, is_full
from audiomae.data import ClipError
from audiomae.training.distributed import Ranks
from audiomae.training.faults import TooManySkippedError
from audiomae.training.signals import Stopped
from audiomae.training.supervisor import Supervisor
from audiomae.training.watchdog import lost_rank

GOES_ON = "--resume auto goes on after the last save"
# What PyTorch's messages of a reading process that died begin with.
WORKER_DIED = "DataLoader worker"
PATIENCE = 20.0
"""Seconds to find out which rank it is that died."""


def carry_out(prog: str, ranks: Ranks, supervisor: Supervisor, train: Callable[[], None]) -> int:
    """Train, and end this rank with one line where that fails.

    Args:
        prog: How the command is called.
        ranks: This process among the others.
        supervisor: Of the run.
        train: Trains.

    Returns:
        The exit status: 0, or 128 and the number of the signal that stopped the run.
    """
    try:
        train()
    except Stopped as stop:
        if ranks.main:
            print(f"{prog}: {stop}: --resume auto goes on from there", file=sys.stderr, flush=True)
        return 128 + stop.number
    except (FloatingPointError, TooManySkippedError) as error:  # the same on all ranks
        end_rank(ranks, f"{prog}: error: {error}" if ranks.main else "", supervisor)
    except OSError as error:
        # The log does not tell of itself what to do about a full disk.
        told = NoSpaceError.at(supervisor.folder) if is_full(error) else error
        end_rank(ranks, error_line(prog, ranks, told), supervisor)
    except RuntimeError as error:
        if str(error).startswith(WORKER_DIED):
            end_rank(ranks, f"{error_line(prog, ranks, error)}; {GOES_ON}", supervisor)
        if not lost_rank(error):
            raise
        lost = supervisor.watchdog.blame(PATIENCE)
        end_rank(ranks, "\n".join(f"{error_line(prog, ranks, line)}; {GOES_ON}" for line in lost))
    return 0


def error_line(prog: str, ranks: Ranks, error: Exception | str) -> str:
    """The line that tells an error of this rank.

    An error of a reading worker carries its traceback as text: the last line is the error itself.
    """
    where = f" (rank {ranks.rank})" if ranks.world_size > 1 else ""
    reason = str(error).strip().splitlines()[-1].removeprefix(f"{ClipError.__module__}.{ClipError.__qualname__}: ")
    return f"{prog}: error{where}: {reason}"


def end_rank(ranks: Ranks, line: str, supervisor: Supervisor | None = None) -> NoReturn:
    """Tell what ended this rank, and exit.

    Args:
        ranks: This process among the others.
        line: What to tell; nothing where another rank speaks for all.
        supervisor: Of a training run, which tells the other ranks too.
    """
    if line:
        print(line, file=sys.stderr, flush=True)
    if supervisor is not None:
        supervisor.watchdog.leave(line)
    if ranks.world_size > 1:
        os._exit(2)  # an orderly exit could wait for the other ranks, which wait for this one
    sys.exit(2)

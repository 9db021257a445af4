"""The store through which the ranks of a run meet."""

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist


def open_store(rank: int, world_size: int, timeout: float = 600.0) -> dist.Store:
    """Open a connection to a store that the ranks of this attempt share, and no earlier attempt.

    torchrun keeps one store over its restarts, with all that the attempts before left in it; how many there were,
    ranks cannot agree on, since a torchrun that joins later counts from 0. Here rank 0 makes a name up for the attempt
    and gives it to each process that announces itself, until all have answered.

    Args:
        rank: This process.
        world_size: How many there are; a single one gets a store of its own.
        timeout: Seconds to wait for the others.

    Raises:
        TimeoutError: Ranks that did not come.
    """
    if world_size == 1:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout)))
    meeting = dist.PrefixStore("audiomae/meeting", store)
    if rank == 0:
        attempt = uuid4().hex
        _invite(meeting, attempt, world_size, timeout)
    else:
        name = uuid4().hex
        meeting.set(f"rank {rank}", name)
        try:
            attempt = meeting.get(name).decode()
        except dist.DistStoreError as error:
            raise TimeoutError(f"rank 0 did not join within {timeout:g} s") from error
        meeting.set(f"{attempt}/{rank}", "joined")
    return dist.PrefixStore(f"audiomae/attempt/{attempt}", store)


def _invite(meeting: dist.Store, attempt: str, world_size: int, timeout: float) -> None:
    """Give the name of an attempt to every rank that announces itself, until all have joined."""
    deadline = time.monotonic() + timeout
    missing = list(range(1, world_size))
    while missing := [rank for rank in missing if not meeting.check([f"{attempt}/{rank}"])]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {missing} of {world_size} did not join within {timeout:g} s")
        for rank in missing:
            if meeting.check([f"rank {rank}"]):  # perhaps that of an earlier attempt, who will not answer
                meeting.set(meeting.get(f"rank {rank}").decode(), attempt)
        time.sleep(0.02)

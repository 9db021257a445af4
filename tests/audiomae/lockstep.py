"""Runs of real processes that only pretend to train, for tests of what happens when some of them die or hang."""

import multiprocessing
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from audiomae.training.rollcall import COMPUTING
from audiomae.training.store import open_store
from audiomae.training.watchdog import Watchdog, lost_rank

RANKS = 3
TIMEOUT = 4.0
# Processes are forked from one that has imported this and computes nothing.
PROCESSES = multiprocessing.get_context("forkserver")


@dataclass
class Run:
    """A run whose steps are short, and what befalls one of its ranks in the third of them."""

    folder: Path
    action: str = "none"
    rank: int = 1
    doing: str = "waiting for data"
    steps: int = 6
    pause: float = 0.02
    timeout: float = TIMEOUT
    agent: bool = True


@dataclass
class Outcome:
    """How the processes of a run ended, and what they left."""

    codes: list[int | None]
    lines: list[str]
    traces: dict[int, str]
    processes: list[int]

    def who(self, rank: int) -> str:
        return f"rank {rank} (host {socket.gethostname()}, process {self.processes[rank]})"


def keep_store(port: Any) -> None:
    """Be torchrun, as far as its store goes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    time.sleep(300)


def train(run: Run, rank: int, world_size: int, port: int) -> None:
    """Be a process that torchrun started, and train in lockstep with the others."""
    os.dup2(os.open(run.folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(run.agent)
    torch.set_num_threads(1)
    if world_size > 1:
        group = dist.PrefixStore("group", open_store(rank, world_size, 60.0))
        dist.init_process_group("gloo", store=group, rank=rank, world_size=world_size)
    store = open_store(rank, world_size, 60.0)
    with Watchdog(store, rank, world_size, timeout=run.timeout, report=run.folder / "report") as watchdog:
        try:
            for step in range(1, run.steps + 1):
                for doing in ("waiting for data", COMPUTING):
                    watchdog.mark(step, doing)
                    if (step, rank, doing) == (3, run.rank, run.doing):
                        befall(run.action)
                if world_size > 1:
                    dist.all_reduce(torch.ones(3))
                time.sleep(run.pause)
                if step == 2 and rank == 0:
                    (run.folder / "began").touch()
        except RuntimeError as error:
            if not lost_rank(error):
                raise
            for line in watchdog.blame(20.0):
                os.write(2, f"audiomae: error (rank {rank}): {line}\n".encode())
            os._exit(2)


def befall(action: str) -> None:
    if action != "none":
        time.sleep(1.5)  # some beats, so that the others know where this one is
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "hang":
        time.sleep(300)
    elif action == "raise":
        raise OSError("cannot be read:\na.wav")


@dataclass
class Group:
    """The processes of a run and the one that keeps their store."""

    run: Run
    world_size: int = RANKS
    ranks: list[Any] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.run.folder.mkdir()
        receiver, sender = PROCESSES.Pipe(duplex=False)
        self.keeper = PROCESSES.Process(target=keep_store, args=(sender,), daemon=True)
        self.keeper.start()
        self.port = receiver.recv()
        if not self.run.agent:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        self.start()
        return self

    def start(self) -> None:
        """Begin an attempt."""
        self.ranks = [
            PROCESSES.Process(target=train, args=(self.run, rank, self.world_size, self.port), daemon=True)
            for rank in range(self.world_size)
        ]
        for process in self.ranks:
            process.start()

    def __exit__(self, *exception: object) -> None:
        for process in (*self.ranks, self.keeper):
            process.kill()
            process.join()

    def wait_for_steps(self) -> None:
        """Wait until the ranks are at work."""
        deadline = time.monotonic() + 60
        while not (self.run.folder / "began").exists():
            assert time.monotonic() < deadline, "the ranks did not begin"
            time.sleep(0.05)

    def outcome(self, *, stuck: int | None = None) -> Outcome:
        """Wait until all ranks but the one that cannot have ended."""
        deadline = time.monotonic() + 60
        for rank, process in enumerate(self.ranks):
            if rank != stuck:
                process.join(max(deadline - time.monotonic(), 0))
        said = "".join(file.read_text() for file in sorted(self.run.folder.glob("*.err")))
        traces = (self.run.folder / "report").glob("hang-rank-*.txt")
        return Outcome(
            [process.exitcode for process in self.ranks],
            [line for line in said.splitlines() if line.startswith("audiomae: ")],
            {int(file.stem.rpartition("-")[2]): file.read_text() for file in traces},
            [process.pid for process in self.ranks],
        )


def burn() -> None:
    while True:
        sum(range(100_000))

"""Where a scenario plays: its folder, its random moments, and its runs of the training command."""

import random
import shlex
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from bench.faults.outcome import last_step
from bench.faults.processes import Command, UnexpectedError

SMALL = shlex.split(
    "--model.spec-size 64 128 --model.embed-dim 32 --model.depth 2 --model.num-heads 2 "
    "--model.decoder-dim 16 --model.decoder-depth 2 --model.decoder-heads 2 "
    "--batch-size 42 --repeats 1 --workers 0 --warmup-epochs 1 --device cpu "
    "--log-every 1 --picture-every 0 --keep-every 0"
)
"""A model that trains on the 126 demo clips in 3 steps an epoch, of a tenth of a second each."""
SMALL_STEPS = 3
LARGE = [*SMALL, *shlex.split("--model.embed-dim 192 --model.depth 4 --model.decoder-dim 64 --batch-size 14")]
"""One whose state of 24 MB takes about as long to save as a step does, and 9 steps an epoch."""
LARGE_STEPS = 9


class References:
    """Runs that nothing befalls, each made once for all scenarios that compare with it.

    Args:
        folder: Where they are.

    Attributes:
        labs: Where they were made.
    """

    def __init__(self, folder: Path):
        self.labs: list[Lab] = []
        self._folder = folder
        self._runs: dict[tuple[str, ...], Future[Path]] = {}
        self._lock = threading.Lock()

    def whole(self, flags: Sequence[str]) -> Path:
        """The folder of a run with these settings that is done."""
        with self._lock:
            own = tuple(flags) not in self._runs
            run = self._runs.setdefault(tuple(flags), Future())
            number = len(self._runs)
        if own:
            self.labs.append(lab := Lab(self._folder / f"whole-{number}", random.Random(), self))
            try:
                with lab:
                    output = lab.folder / "run"
                    lab.finish(lab.pretrain(output, *flags))
            except BaseException as error:
                run.set_exception(error)
            else:
                run.set_result(output)
        return run.result()


@dataclass
class Lab:
    """Where a scenario plays; a context manager that leaves no process behind.

    Attributes:
        folder: For whatever it makes.
        draw: Its random moments and places.
        references: Runs to compare with.
        commands: All that were started.
        closed: Whether no more may be.
    """

    folder: Path
    draw: random.Random
    references: References
    commands: list[Command] = field(default_factory=list)
    closed: bool = False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all that were started."""
        self.closed = True
        for command in self.commands:
            command.close()

    def start(self, *arguments: str, **environment: str) -> Command:
        """Start a Python program, which computes on one thread, with these variables."""
        if self.closed:
            raise UnexpectedError("interrupted")
        printed = self.folder / f"printed-{len(self.commands)}.txt"
        command = Command([sys.executable, *arguments], printed, {"OMP_NUM_THREADS": "1", **environment})
        self.commands.append(command)
        return command

    def pretrain(self, output: Path, *flags: str) -> Command:
        """Start pre-training in this output folder; a run that is there already goes on."""
        return self.start("-m", "audiomae.pretrain", *run_flags(output, flags))

    def torchrun(
        self, output: Path, *flags: str, ranks: int = 2, options: Sequence[str] = ("--standalone",), **environment: str
    ) -> Command:
        """Start it on several ranks, by a torchrun with these options and variables."""
        launcher = ["-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks)]
        return self.start(*launcher, "-m", "audiomae.pretrain", *run_flags(output, flags), **environment)

    def on(self, ranks: int, output: Path, *flags: str) -> Command:
        """Start it on so many ranks."""
        return self.pretrain(output, *flags) if ranks == 1 else self.torchrun(output, *flags, ranks=ranks)

    def whole(self, *flags: str) -> Path:
        """The folder of a run with these settings that nothing befell."""
        return self.references.whole(flags)

    def finish(self, command: Command) -> None:
        """Wait until a run has ended as it should.

        Raises:
            UnexpectedError: It ends otherwise.
        """
        if status := command.wait():
            raise UnexpectedError(f"status {status}, expected 0: {command.last_line}")


def run_flags(output: Path, flags: Sequence[str]) -> list[str]:
    """Flags of a run in a folder, which goes on if it is there already."""
    return ["--output-dir", str(output), "--resume", "auto", *flags]


def wait_for_steps(command: Command, output: Path, step: int) -> int:
    """Wait until a run has logged a step, and return the last one that it has."""
    return command.wait_for(lambda: reached if (reached := last_step(output)) >= step else None, f"step {step}")


def wait_for_start(command: Command, output: Path, launches: int) -> None:
    """Wait until a run that was begun so many times before trains."""
    command.wait_for(lambda: count_launches(output) > launches, "training")


def count_launches(output: Path) -> int:
    """How many processes have begun to train in a folder."""
    path = output / "launches.jsonl"
    return path.read_text().count("\n") if path.exists() else 0

"""Ranks that die, hang, join and leave, and other numbers of them."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from bench.faults.lab import SMALL, SMALL_STEPS, Lab, wait_for_steps
from bench.faults.outcome import Outcome, last_step
from bench.faults.processes import Command, ranks_of
from bench.faults.stops import check_resumed, epochs_for, resumed_step, wait_for_random_moment

COMBINATIONS = tuple(
    (ranks, workers, (1, 2, 3)[(row + column) % 3])
    for row, ranks in enumerate((1, 4, 2))
    for column, workers in enumerate((0, 1, 2))
)
"""Ranks, reading workers of each, and micro-batches, such that any two values of two of them meet."""

ELASTIC_EPOCHS = 45
TORCHRUN = ("--max-restarts=3", "--monitor-interval=0.5", "--rdzv-backend=c10d")
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""The ranks meet by a store of their own. PyTorch keeps the one that torchruns share over restarts: whoever joins later
waits in vain for its address, and when the torchrun with rank 0 is lost, so is the store."""
# How long to wait for more agents once the least number is there, and when an agent without a sign of life is dead.
RENDEZVOUS = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"


def rank_killed(lab: Lab, times: int) -> Outcome:
    """Kill one of two ranks at random moments, and start both again."""

    def see_end(outcome: Outcome, run: Command) -> None:
        outcome.expect(run.wait() != 0, "torchrun ended as if the run was done")

    return lose_ranks(lab, times, signal.SIGKILL, see_end, "--workers", "1")


def rank_stopped(lab: Lab, times: int) -> Outcome:
    """Stop one of two ranks, so that it hangs, and start both again when that is told."""

    def see_end(outcome: Outcome, run: Command) -> None:
        run.wait_for_text("audiomae: error: ")
        run.close()  # torchrun would wait for half a minute until it kills the one that is stopped

    return lose_ranks(lab, times, signal.SIGSTOP, see_end, "--hang-timeout", "16")


def lose_ranks(
    lab: Lab, times: int, number: signal.Signals, see_end: Callable[[Outcome, Command], None], *flags: str
) -> Outcome:
    """Send one of two ranks a signal at random moments, see the run end, and start both again."""
    outcome, output = Outcome(), lab.folder / "run"
    settings = (*SMALL, "--epochs", epochs_for(times, SMALL_STEPS))
    whole = lab.whole(*settings)
    reached = 0
    for turn in range(times):
        run = lab.torchrun(output, *settings, "--save-steps", "1", *flags)
        rank, process = befall_rank(lab, run, output, reached, turn % 2, number)
        outcome.add(f"rank {rank}")
        see_end(outcome, run)
        check_named(outcome, run, rank, process)
        check_resumed(outcome, resumed_step(run, SMALL_STEPS), reached - 1)
        reached = last_step(output)
    end = lab.torchrun(output, *settings)
    lab.finish(end)
    check_resumed(outcome, resumed_step(end, SMALL_STEPS), reached - 1)
    outcome.same_curve(output, whole)
    return outcome


def befall_rank(
    lab: Lab, run: Command, output: Path, reached: int, rank: int, number: signal.Signals
) -> tuple[int, int]:
    """Send a rank a signal at a random moment; return it and its process."""
    wait_for_random_moment(lab, run, output, reached)
    process = ranks_of(run.process.pid)[rank]
    os.kill(process, number)
    return rank, process


def check_named(outcome: Outcome, run: Command, rank: int, process: int) -> None:
    """Check that the run told which rank was lost."""
    lines = [line for line in run.text.splitlines() if re.match(r"audiomae(\.pretrain)?: error", line)]
    named = f"rank {rank} (host {socket.gethostname()}, process {process}): no sign of life"
    outcome.expect(len(lines) == 1 and named in lines[0], f"not told of {named!r}, but {lines}")


def combinations(lab: Lab, times: int) -> Outcome:
    """Train with other numbers of ranks, workers and micro-batches."""
    outcome = Outcome()
    settings = (*SMALL, "--epochs", "4")
    whole = lab.whole(*settings)
    for ranks, workers, accumulation in COMBINATIONS[-times:]:
        output = lab.folder / f"ranks-{ranks}-workers-{workers}-accumulation-{accumulation}"
        outcome.add(f"with {ranks} rank{'s' * (ranks > 1)}")
        lab.finish(lab.on(ranks, output, *settings, "--workers", str(workers), "--accumulation", str(accumulation)))
        outcome.same_curve(output, whole)
    return outcome


def other_ranks(lab: Lab, times: int) -> Outcome:
    """Stop a run with SIGTERM and go on with another number of ranks, again and again."""
    outcome, output = Outcome(), lab.folder / "run"
    settings = (*SMALL, "--epochs", epochs_for(times, SMALL_STEPS))
    whole = lab.whole(*settings)
    counts = [(1, 2, 4)[number % 3] for number in range(times + 1)]
    saved = 0
    for number, (before, ranks) in enumerate(zip([0, *counts], counts, strict=False)):
        run = lab.on(ranks, output, *settings)
        if number < times:
            wait_for_random_moment(lab, run, output, saved)
            run.signal(signal.SIGTERM)
            outcome.expect(run.wait() != 0, "it ended as if the run was done")
        else:
            lab.finish(run)
        if number:
            outcome.add(f"from {before} to {ranks}")
            told = f"changed since the checkpoint: ranks were {before}, are {ranks}"
            outcome.expect(told in run.text, f"not told: {told}")
            check_resumed(outcome, resumed_step(run, SMALL_STEPS), saved)
        saved = last_step(output)
    outcome.same_curve(output, whole)
    return outcome


class Agents:
    """Several torchruns, each with one rank, that make up a run together.

    Args:
        lab: Where they run.
        output: Folder of the run.
        flags: Its settings.
        nodes: How many of them there must be and may be.
    """

    def __init__(self, lab: Lab, output: Path, flags: tuple[str, ...], nodes: str = "1:3"):
        self._lab, self._output, self._flags = lab, output, flags
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self._options = (
                *TORCHRUN,
                "--nnodes",
                nodes,
                "--rdzv-endpoint",
                f"localhost:{free.getsockname()[1]}",
                "--rdzv-id",
                output.name,
            )
        self.commands: list[Command] = []

    def start(self) -> None:
        """Start one more; the first one keeps the store by which they meet."""
        # On several machines, torchrun knows by the host of the endpoint which of them that is.
        options = (*self._options, "--rdzv-conf", f"{RENDEZVOUS},is_host={not self.commands}")
        command = self._lab.torchrun(self._output, *self._flags, ranks=1, options=options, **OWN_STORE)
        self.commands.append(command)

    def launches(self) -> list[int]:
        """How many ranks there were at each start of the run."""
        path = self._output / "launches.jsonl"
        return [json.loads(line)["ranks"] for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_ranks(self, ranks: int, since: int) -> None:
        """Wait until the run has begun with so many ranks, after so many other starts, and taken some steps."""
        self.commands[0].wait_for(
            lambda: len(launches := self.launches()) > since and launches[-1] == ranks, f"{ranks} ranks", every=0.05
        )
        begun = last_step(self._output)
        wait_for_steps(self.commands[0], self._output, begun + self._lab.draw.randint(1, 4))

    @property
    def text(self) -> str:
        """What all have printed."""
        return "".join(command.text for command in self.commands)


def elastic(lab: Lab, times: int) -> Outcome:
    """Kill a rank of three torchruns, then a torchrun with its rank, and start another one."""
    outcome = Outcome()
    settings = (*SMALL, "--epochs", str(ELASTIC_EPOCHS))
    whole = lab.whole(*settings)
    for number in range(times):
        agents = Agents(lab, output := lab.folder / f"run-{number}", (*settings, "--save-steps", "1"))
        for _ in range(3):
            agents.start()
        agents.wait_for_ranks(3, 0)

        starts, reached = len(agents.launches()), last_step(output)
        victim = lab.draw.randrange(3)
        (process,) = ranks_of(agents.commands[victim].process.pid).values()
        os.kill(process, signal.SIGKILL)
        outcome.add("a rank killed")
        agents.wait_for_ranks(3, starts)
        outcome.expect(last_step(output) >= reached, f"step {last_step(output)} after {reached}")

        starts = len(agents.launches())
        agents.commands.pop(lab.draw.randint(1, 2)).close()
        outcome.add("a torchrun killed")
        agents.wait_for_ranks(2, starts)
        told = "changed since the checkpoint: ranks were 3, are 2"
        outcome.expect(told in agents.text, f"not told: {told}")

        starts = len(agents.launches())
        agents.start()
        outcome.add("a torchrun more")
        agents.wait_for_ranks(3, starts)
        told = "changed since the checkpoint: ranks were 2, are 3"
        outcome.expect(told in agents.text, f"not told: {told}")
        for agent in agents.commands:
            lab.finish(agent)
        outcome.same_curve(output, whole)
    return outcome

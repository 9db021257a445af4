"""A run that is killed, or asked to stop."""

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.faults.lab import (
    LARGE,
    LARGE_STEPS,
    SMALL,
    SMALL_STEPS,
    Lab,
    count_launches,
    wait_for_start,
    wait_for_steps,
)
from bench.faults.outcome import Outcome, last_step
from bench.faults.processes import Command, alive, children, ranks_of

STEPS = 4
"""Steps that a process takes at most before something befalls it."""


def resumed_step(command: Command, steps_per_epoch: int) -> int | None:
    """The step that a process says it goes on after; None for one that has not said so."""
    found = re.search(r"resumed from \S+, after epoch (\d+)(?: and step (\d+) of)?", command.text)
    return None if found is None else int(found[1]) * steps_per_epoch + int(found[2] or 0)


def epochs_for(stops: int, steps_per_epoch: int) -> str:
    """Epochs of a run that is not done before so many processes have each taken some steps of it."""
    return str(-(-stops * (STEPS + 2) // steps_per_epoch) + 1)


def sigkill(lab: Lab, times: int) -> Outcome:
    """Kill a run at random moments: while it trains, while it saves, and while it starts."""
    outcome, output = Outcome(), lab.folder / "run"
    settings = (*LARGE, "--epochs", epochs_for(times, LARGE_STEPS))
    whole = lab.whole(*settings, "--save-steps", "0", "--save-every", "999999")
    start_up, logged = 5.0, 0
    for number in range(times):
        launches, begin = count_launches(output), time.monotonic()
        run = lab.pretrain(output, *settings, "--save-steps", "1")
        if number % 3 == 2:
            time.sleep(lab.draw.uniform(0, start_up))
        else:
            wait_for_start(run, output, launches)
            start_up = time.monotonic() - begin
            wait_for_steps(run, output, (resumed_step(run, LARGE_STEPS) or 0) + lab.draw.randint(1, STEPS))
            if number % 3 == 1:
                run.wait_for(lambda: list(output.glob("checkpoint-last.pt.*.tmp")), "save", every=0.0005)
            time.sleep(lab.draw.uniform(0, 0.15))
        run.kill()
        trained = count_launches(output) > launches
        saving = list(output.glob(f"*.{run.process.pid}.tmp"))
        outcome.add("during a save" if saving else "while training" if trained else "while starting")
        if trained:
            resumed = resumed_step(run, LARGE_STEPS)
            check_resumed(outcome, resumed, logged - 1)
            logged = last_step(output)
    end = lab.pretrain(output, *settings, "--save-steps", "1")
    lab.finish(end)
    check_resumed(outcome, resumed_step(end, LARGE_STEPS), logged - 1)
    if times >= 4:
        outcome.expect(outcome.kinds.get("during a save", 0) >= times / 4, "too few of the moments were during a save")
    outcome.same_run(output, whole)
    return outcome


def check_resumed(outcome: Outcome, resumed: int | None, saved: int) -> None:
    """Check that a process went on from the last step that was saved at least."""
    if saved > 0:
        outcome.expect(
            resumed is not None and resumed >= saved, f"went on after step {resumed}, though {saved} was saved"
        )


def stop_by_signals(
    lab: Lab,
    times: int,
    numbers: Sequence[signal.Signals],
    send: Callable[[Command, signal.Signals], None],
    *flags: str,
) -> Outcome:
    """Ask a run to stop at random moments, by each of these signals in turn."""
    outcome, output = Outcome(), lab.folder / "run"
    settings = (*SMALL, "--epochs", epochs_for(times, SMALL_STEPS))
    whole = lab.whole(*settings)
    stopped = 0
    for turn in range(times):
        number = numbers[turn % len(numbers)]
        run = lab.pretrain(output, *settings, *flags)
        wait_for_random_moment(lab, run, output, stopped)
        send(run, number)
        outcome.add(*([number.name] if len(numbers) > 1 else []))
        stopped = check_stopped(outcome, run, number, stopped)
    finish_and_compare(lab, outcome, lab.pretrain(output, *settings, *flags), output, whole, stopped)
    return outcome


def sigterm(lab: Lab, times: int) -> Outcome:
    """SIGTERM, as a batch system sends it."""
    return stop_by_signals(lab, times, [signal.SIGTERM], Command.signal)


def sigint(lab: Lab, times: int) -> Outcome:
    """SIGINT, as Ctrl-C sends it."""
    return stop_by_signals(lab, times, [signal.SIGINT], Command.signal)


def signal_to_group(lab: Lab, times: int) -> Outcome:
    """Send both signals to a run together with the processes that read for it."""
    return stop_by_signals(lab, times, [signal.SIGTERM, signal.SIGINT], Command.signal_group, "--workers", "2")


def signal_to_torchrun(lab: Lab, times: int) -> Outcome:
    """Send both signals to a torchrun, which passes them on to its ranks and their readers."""
    outcome, output = Outcome(), lab.folder / "run"
    settings = (*SMALL, "--epochs", epochs_for(times, SMALL_STEPS))
    whole = lab.whole(*settings)
    stopped = 0
    for turn in range(times):
        number = (signal.SIGTERM, signal.SIGINT)[turn % 2]
        run = lab.torchrun(output, *settings, "--workers", "1")
        wait_for_random_moment(lab, run, output, stopped)
        ranks = ranks_of(run.process.pid)
        run.signal(number)
        outcome.add(number.name)
        outcome.expect(run.wait() != 0, "torchrun ended as if the run was done")
        outcome.expect(not any(map(alive, ranks.values())), "a rank lives on")
        stopped = check_told(outcome, run, number, stopped)
    lab.finish(lab.torchrun(output, *settings))
    outcome.same_curve(output, whole)
    return outcome


def worker_killed(lab: Lab, times: int) -> Outcome:
    """Kill a process that reads clips, as the kernel does when memory is short."""
    outcome, output = Outcome(), lab.folder / "run"
    settings = (*SMALL, "--epochs", epochs_for(times, SMALL_STEPS))
    whole = lab.whole(*settings)
    reached = 0
    for _ in range(times):
        run = lab.pretrain(output, *settings, "--workers", "2", "--save-steps", "1")
        wait_for_random_moment(lab, run, output, reached)
        worker = lab.draw.choice(children(run.process.pid))
        os.kill(worker, signal.SIGKILL)
        outcome.add()
        outcome.expect(run.wait() == 2, f"status {run.process.returncode}, expected 2")
        # PyTorch has two ways to notice, and says "(pid 1) is killed" or "(pid(s) 1) exited".
        told = re.match(rf"audiomae\.pretrain: error: DataLoader worker \(pid(\(s\))? {worker}\) ", run.last_line)
        outcome.expect(told is not None, f"not told: {run.last_line}")
        reached = last_step(output)
    finish_and_compare(lab, outcome, lab.pretrain(output, *settings), output, whole, reached - 1)
    return outcome


def wait_for_random_moment(lab: Lab, run: Command, output: Path, step: int) -> None:
    """Wait until some steps after this one, and a part of a step."""
    wait_for_steps(run, output, step + lab.draw.randint(1, STEPS))
    time.sleep(lab.draw.uniform(0, 0.1))


def check_stopped(outcome: Outcome, run: Command, number: signal.Signals, earlier: int) -> int:
    """Check how a run ended that was asked to, and that it had gone on where it stopped before; return where it is."""
    status = run.wait()
    outcome.expect(status == 128 + number, f"status {status}, expected {128 + number}: {run.last_line}")
    return check_told(outcome, run, number, earlier)


def check_told(outcome: Outcome, run: Command, number: signal.Signals, earlier: int) -> int:
    """Check what a run said that was asked to stop; return the step that it says is saved."""
    resumed = resumed_step(run, SMALL_STEPS) or 0
    outcome.expect(resumed == earlier, f"went on after step {resumed}, though {earlier} was saved")
    told = re.search(rf"stopped by {number.name} after step (\d+), whose state is saved", run.text)
    outcome.expect(told is not None, f"no word of a save: {run.last_line}")
    return int(told[1]) if told else earlier


def finish_and_compare(lab: Lab, outcome: Outcome, run: Command, output: Path, whole: Path, saved: int) -> None:
    """Let a run go on to its end, and compare it with one that nothing befell."""
    lab.finish(run)
    check_resumed(outcome, resumed_step(run, SMALL_STEPS), saved)
    outcome.same_run(output, whole)

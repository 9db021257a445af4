"""Checkpoints that are broken, a disk that is full, and two runs in one folder."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from audiomae.checkpoints import CheckpointError
from audiomae.checkpoints.files import BrokenFileError
from audiomae.training.state import read_state
from bench.faults.lab import SMALL, Lab, wait_for_steps
from bench.faults.outcome import Outcome
from bench.faults.processes import alive, children
from bench.faults.stops import check_resumed, resumed_step

EPOCHS, STEPS_PER_EPOCH = 6, 3
SETTINGS = (*SMALL, "--epochs", str(EPOCHS))
DISK = "8m"
"""Size of the disk that is filled, of which a run takes less than half."""


Spoil = Callable[[bytes, Lab], bytes]


def truncate(content: bytes, lab: Lab) -> bytes:
    """Cut a file at a random place."""
    return content[: lab.draw.randrange(len(content))]


def flip(content: bytes, lab: Lab) -> bytes:
    """Flip one random bit."""
    spoilt, place = bytearray(content), lab.draw.randrange(8 * len(content))
    spoilt[place // 8] ^= 1 << place % 8
    return bytes(spoilt)


def truncated(lab: Lab, times: int) -> Outcome:
    """Read a checkpoint that is cut off at random lengths."""
    return read_spoilt(lab, times, truncate)


def flipped(lab: Lab, times: int) -> Outcome:
    """Read a checkpoint in which a random bit is wrong."""
    return read_spoilt(lab, times, flip)


def read_spoilt(lab: Lab, times: int, spoil: Spoil) -> Outcome:
    """Read copies of a checkpoint that are spoilt each in another place."""
    outcome = Outcome()
    content = (lab.whole(*SETTINGS) / "checkpoint-last.pt").read_bytes()
    path = lab.folder / "checkpoint.pt"
    path.write_bytes(content)
    read_state(path)  # so that what follows is the fault's doing
    for _ in range(times):
        spoilt = spoil(content, lab)
        path.write_bytes(spoilt)
        outcome.add()
        try:
            read_state(path)
        except (BrokenFileError, CheckpointError):
            continue
        outcome.lost.append(f"read as if it were whole: {len(spoilt)} of {len(content)} bytes")
    if not outcome.lost:
        outcome.keep("every one was refused")
    return outcome


def broken_checkpoint(lab: Lab, times: int) -> Outcome:
    """Spoil the last checkpoint of a run that was stopped, in turn by both faults, and go on."""
    outcome, stopped = Outcome(), lab.folder / "stopped"
    run = lab.pretrain(stopped, *SETTINGS, "--save-steps", "1")
    wait_for_steps(run, stopped, 5)
    run.kill()
    whole = lab.whole(*SETTINGS)
    before = last_whole(stopped)
    for number in range(times):
        kind, spoil = (("truncated", truncate), ("a bit flipped", flip))[number % 2]
        output = shutil.copytree(stopped, lab.folder / f"run-{number}")
        last = output / "checkpoint-last.pt"
        last.write_bytes(spoil(last.read_bytes(), lab))
        outcome.add(kind)
        run = lab.pretrain(output, *SETTINGS)
        lab.finish(run)
        told = f"resumed from {output / 'checkpoint-previous.pt'}, " in run.text
        outcome.expect(told and str(last) in run.text, f"not told: {run.text}")
        check_resumed(outcome, resumed_step(run, STEPS_PER_EPOCH), before)
        outcome.expect((output / "checkpoint-last.broken").exists(), "the broken one was not kept aside")
        outcome.same_run(output, whole)
    return outcome


def last_whole(run: Path) -> int:
    """The step of the checkpoint before the last one."""
    return read_state(run / "checkpoint-previous.pt").progress["step"]


@contextmanager
def small_disk(folder: Path) -> Iterator[str | None]:
    """Mount a disk of some MB; yields why that cannot be, or None."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        yield str(error)
        return
    if done.returncode:
        yield done.stderr.strip() or f"mount ended with status {done.returncode}"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def full_disk(lab: Lab, times: int) -> Outcome:
    """Fill the disk of a run at a random moment; make room, and go on."""
    outcome = Outcome()
    whole = lab.whole(*SETTINGS)
    for number in range(times):
        disk = lab.folder / f"disk-{number}"
        with small_disk(disk) as reason:
            if reason is not None:
                outcome.absent = f"a disk of its own needs the right to mount one: {reason}"
                return outcome
            fill_and_go_on(lab, outcome, disk, whole, FILLED[number % len(FILLED)])
    return outcome


FILLED = ("room for a part of a checkpoint", "no room for a checkpoint", "no room for the log")
"""What is left on a disk that is full, and what is to be written there next."""


def fill_and_go_on(lab: Lab, outcome: Outcome, disk: Path, whole: Path, filled: str) -> None:
    """Fill one disk under a run."""
    output = disk / "run"
    # Twelve lines of the log leave some of a page of memory, which a disk of this kind gives out, and sixteen do not.
    rare = filled == "no room for the log"
    run = lab.pretrain(output, *SETTINGS, *(("--save-every", "4") if rare else ("--save-steps", "1")))
    wait_for_steps(run, output, 13 if rare else lab.draw.randint(2, 8))
    size = (output / "checkpoint-last.pt").stat().st_size
    outcome.add(filled)
    fill(disk / "filler", disk, lab.draw.randrange(size // 20, size // 2) if "part" in filled else 0)
    outcome.expect(run.wait() == 2, f"status {run.process.returncode}, expected 2")
    for told in (" space ", "make room, then go on"):
        outcome.expect(told in run.last_line, f"{filled}: not told: {told!r} in {run.last_line!r}")
    saved = []
    for path in output.glob("checkpoint-*.pt"):
        try:
            saved.append(read_state(path).progress["step"])
        except (OSError, ValueError) as error:
            outcome.lost.append(f"{filled}: {path.name}: {error}")
    (disk / "filler").unlink()
    end = lab.pretrain(output, *SETTINGS)
    lab.finish(end)
    check_resumed(outcome, resumed_step(end, STEPS_PER_EPOCH), max(saved, default=0))
    outcome.same_run(output, whole)


def fill(filler: Path, disk: Path, room: int) -> None:
    """Write until so many bytes are left."""
    with filler.open("wb", buffering=0) as file:
        try:
            while (free := shutil.disk_usage(disk).free - room) > 0:
                file.write(bytes(min(free, 1 << 16)))
        except OSError:
            return


def two_runs(lab: Lab, times: int) -> Outcome:
    """Start a run in the folder of another one; kill that one, and start again while its readers still live."""
    outcome = Outcome()
    whole = lab.whole(*SETTINGS)
    for number in range(times):
        output = lab.folder / f"run-{number}"
        first = lab.pretrain(output, *SETTINGS, "--workers", "2", "--save-steps", "1")
        reached = wait_for_steps(first, output, 4)
        first.signal(signal.SIGSTOP)  # or it would be done before the second one has started
        outcome.add()
        second = lab.pretrain(output, *SETTINGS)
        outcome.expect(second.wait() == 2, f"status {second.process.returncode} of the second run, expected 2")
        told = f"{output} is in use by process {first.process.pid} on "
        outcome.expect(told in second.last_line, f"not told: {second.last_line}")
        readers = children(first.process.pid)
        for reader in readers:
            os.kill(reader, signal.SIGSTOP)  # or they would end some seconds after the first run
        first.kill()
        third = lab.pretrain(output, *SETTINGS)
        lab.finish(third)
        outcome.expect(len(readers) == 2 and all(map(alive, readers)), "the readers of the first run did not live on")
        check_resumed(outcome, resumed_step(third, STEPS_PER_EPOCH), reached - 1)
        outcome.same_run(output, whole)
        first.close()
    return outcome

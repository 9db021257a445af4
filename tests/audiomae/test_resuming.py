"""A run that is stopped, killed or interrupted goes on exactly, from whole checkpoints, on any number of ranks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from audiomae import data
from audiomae.checkpoints.checksum import save_with_checksum
from audiomae.checkpoints.files import load_pickle
from audiomae.model import AudioMAE
from audiomae.training import state
from tests.audiomae.runs import (
    FLAGS,
    TINY,
    assert_same_curve,
    assert_same_run,
    losses,
    read_log,
    run,
    torchrun,
    whole,
)

__all__ = ["whole"]


class StopAfter:
    """Sends this process a signal in the forward of a step, as if it came from outside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals):
        self.left, self.number, self.forward = step, number, AudioMAE.forward
        monkeypatch.setattr(AudioMAE, "forward", lambda model, *args, **kwargs: self(model, *args, **kwargs))

    def __call__(self, model, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return self.forward(model, *args, **kwargs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_signal_saves_and_the_resumed_run_is_the_whole_one(
    number: signal.Signals,
    step: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        StopAfter(patched, step, number)
        with pytest.raises(SystemExit) as end:
            run(tmp_path, *FLAGS, "--workers", "1")
    assert end.value.code == 128 + number
    # A stop is agreed on a step later, lest any step wait for the device; the end of an epoch waits in any case.
    stopped = step if step % 3 == 0 else step + 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"audiomae.pretrain: stopped by {number.name} after step {stopped}, whose state is saved")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    run(tmp_path, *FLAGS, "--resume", "auto")
    assert_same_run(tmp_path, whole)


def test_every_step_can_be_gone_on_from(whole: Path, tmp_path: Path) -> None:
    log_flags = ("--log-every", "2", "--model.bias-dropout", "0.3")
    run(tmp_path / "whole", *FLAGS, *log_flags)
    run(tmp_path / "saved", *FLAGS, *log_flags, "--save-steps", "1")
    assert_same_run(tmp_path / "saved", tmp_path / "whole")
    output = tmp_path / "run"
    copies = []
    save = state.save_state

    def save_and_copy(folder: Path, saved: state.State, *args: object, **kwargs: object) -> None:
        save(folder, saved, *args, **kwargs)  # type: ignore[arg-type]
        copies.append(shutil.copytree(folder, tmp_path / f"step-{saved.progress['step']}"))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("audiomae.training.supervisor.save_state", save_and_copy)
        run(output, *FLAGS, *log_flags, "--save-steps", "1")
    assert len(copies) == 9
    for copy in copies[:-1]:
        run(copy, *FLAGS, *log_flags, "--resume", "auto")
        assert_same_run(copy, tmp_path / "whole")


def test_processes_workers_and_micro_batches_do_not_change_the_curve(whole: Path, tmp_path: Path) -> None:
    # 42 clips are 14 for each of 3 ranks, and 4 ranks have 10 or 11 of them, in lists of 2 and 3.
    for ranks, accumulation, workers in ((3, 1, 1), (4, 4, 0)):
        output = tmp_path / str(ranks)
        done = torchrun(output, *FLAGS, "--accumulation", str(accumulation), "--workers", str(workers), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert_same_curve(output, whole)


def test_another_number_of_ranks_goes_on_and_is_told(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-last.pt").unlink()  # what is left is of the epoch before
    done = torchrun(tmp_path / "run", *FLAGS, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "changed since the checkpoint: ranks were 1, are 2" in done.stderr
    assert_same_curve(tmp_path / "run", whole)


@pytest.mark.parametrize("flags", [["--parallel", "fsdp", "--checkpoint-activations"], ["--reduce-dtype", "bf16"]])
def test_shards_and_copies_train_alike_and_exchange_checkpoints(flags: list[str], whole: Path, tmp_path: Path) -> None:
    done = torchrun(tmp_path / "run", *FLAGS, *flags, "--accumulation", "2", "--save-steps", "1")
    assert done.returncode == 0, done.stderr
    exact = losses(read_log(whole))
    tolerance = 1e-5 if "fsdp" in flags else 2e-3
    torch.testing.assert_close(losses(read_log(tmp_path / "run")), exact, rtol=tolerance, atol=0)
    if "bf16" in flags:
        assert losses(read_log(tmp_path / "run")).tolist() != exact.tolist()
        return
    (tmp_path / "run" / "checkpoint-last.pt").unlink()
    run(tmp_path / "run", *FLAGS, "--resume", "auto")  # on a single rank
    assert_same_curve(tmp_path / "run", whole)
    shutil.copytree(whole, tmp_path / "other")
    (tmp_path / "other" / "checkpoint-last.pt").unlink()
    done = torchrun(tmp_path / "other", *FLAGS, *flags, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert_same_curve(tmp_path / "other", whole)


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes(content if how == "flipped" else content[: len(content) * 2 // 3] if how == "truncated" else b"")


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty"])
def test_a_broken_checkpoint_is_told_and_the_one_before_it_taken(
    how: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    spoil(output / "checkpoint-last.pt", how)
    reason = {"flipped": "its bytes do not match its checksum", "truncated": "is truncated", "empty": "is empty"}[how]
    run(output, *FLAGS, "--resume", "auto")
    printed = capsys.readouterr().err
    assert f"{output / 'checkpoint-last.pt'} is" in printed
    assert reason in printed
    assert f"resumed from {output / 'checkpoint-previous.pt'}, after epoch 2" in printed
    assert "checkpoint-last.pt is kept as checkpoint-last.broken" in printed
    assert_same_run(output, whole)
    # The broken one did not take the place of the one before it.
    spoil(output / "checkpoint-last.pt", how)
    run(output, *FLAGS, "--resume", "auto")
    assert_same_run(output, whole)


def test_no_whole_checkpoint_is_an_error_that_names_all(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for name in ("checkpoint-last.pt", "checkpoint-previous.pt"):
        spoil(tmp_path / "run" / name, "flipped")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", *FLAGS, "--resume", "auto")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint-last.pt is corrupt" in line
    assert "checkpoint-previous.pt is corrupt" in line


def test_a_full_disk_leaves_what_is_there_and_says_what_to_do(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "checkpoint-last.pt").unlink()
    before = (output / "checkpoint-previous.pt").read_bytes()

    def write_part(content: object, path: Path) -> None:
        path.write_bytes(b"part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state, "save_with_checksum", write_part)
    with pytest.raises(SystemExit) as end:
        run(output, *FLAGS, "--resume", "auto")
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"no space is left to write {output / 'checkpoint-last.pt'} (" in last
    assert "every file that was there is whole; make room, then go on" in last
    assert (output / "checkpoint-previous.pt").read_bytes() == before
    assert not list(output.glob("*.tmp"))


def start(output: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "audiomae.pretrain", *TINY, "--output-dir", str(output), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_run_is_refused_until_the_first_is_dead(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--epochs", "9999", "--picture-every", "0", "--workers", "1")
    first = start(tmp_path, *flags)
    try:
        wait_for(tmp_path / "checkpoint-last.pt", first)
        with pytest.raises(SystemExit) as end:
            run(tmp_path, *flags, "--resume", "auto")
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path} is in use by process {first.pid} on " in line
        (tmp_path / f"checkpoint-last.pt.{first.pid}.tmp").write_bytes(b"half")
    finally:
        first.kill()
        first.wait()
    # The worker of the first one lives on for a moment; the lock does not.
    with pytest.MonkeyPatch.context() as patched:
        StopAfter(patched, 1, signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            run(tmp_path, *flags, "--resume", "auto")
    assert end.value.code == 128 + signal.SIGTERM
    assert f"removed what a killed run left half written: checkpoint-last.pt.{first.pid}.tmp" in capsys.readouterr().err


def test_another_list_of_clips_is_told(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-last.pt").unlink()
    demo = Path(data.__file__).parent / "demo"
    lines = (demo / "clips.csv").read_text().splitlines(keepends=True)
    shutil.copytree(demo, tmp_path / "demo")
    (tmp_path / "demo" / "clips.csv").write_text("".join([lines[0], *reversed(lines[1:])]))
    run(tmp_path / "run", *FLAGS, "--resume", "auto", "--data", str(tmp_path / "demo" / "clips.csv"))
    assert "changed since the checkpoint: the list of clips" in capsys.readouterr().err


def test_another_device_is_told_where_it_changes_the_precision(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    saved = load_pickle(whole / "checkpoint-previous.pt")
    save_with_checksum(
        {**saved, "launch": {**saved["launch"], "device_type": "cuda"}}, tmp_path / "run" / "checkpoint-last.pt"
    )
    run(tmp_path / "run", *FLAGS, "--resume", "auto")
    told = "changed since the checkpoint: precision was bfloat16 on cuda, is float32 on cpu"
    assert told in capsys.readouterr().err
    shutil.copytree(whole, tmp_path / "same")
    run(tmp_path / "same", *FLAGS, "--resume", "auto")
    assert "precision was" not in capsys.readouterr().err


def test_what_another_run_saved_in_the_meantime_is_not_gone_behind(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    saved = tmp_path / "run" / "checkpoint-last.pt"

    def save_meanwhile(*_: object) -> None:
        shutil.copyfile(saved, tmp_path / "copy")
        (tmp_path / "copy").replace(saved)

    monkeypatch.setattr("audiomae.pretrain.agree_on_step", save_meanwhile)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", "--epochs", "4", "--resume", "auto")
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"another run saved to {tmp_path / 'run'} while this one began: start this one again" in last
    assert (tmp_path / "run" / "log.jsonl").read_text() == log


@pytest.mark.parametrize(
    ("flags", "saved", "kept"),
    [
        (["--save-steps", "3"], [3, 6, 9], []),
        (["--save-steps", "2"], [2, 4, 6, 8, 9], []),
        (["--save-steps", "0", "--keep-every", "2"], [6, 9], ["checkpoint-epoch-0002.pt"]),
    ],
)
def test_states_are_saved_when_they_should_be(
    flags: list[str], saved: list[int], kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def save(folder: Path, saved: state.State, *args: Any, **kwargs: Any) -> None:
        steps.append(saved.progress["step"])
        state.save_state(folder, saved, *args, **kwargs)

    monkeypatch.setattr("audiomae.training.supervisor.save_state", save)
    run(tmp_path, *FLAGS, "--save-every", "100", *flags)
    assert steps == saved
    assert [path.name for path in tmp_path.glob("checkpoint-epoch-*")] == kept


def test_a_run_says_with_what_it_was_started(whole: Path) -> None:
    (launch,) = map(json.loads, (whole / "launches.jsonl").read_text().splitlines())
    assert launch["torch"] == torch.__version__.partition("+")[0]
    assert launch["ranks"] == 1
    assert "pytest" in launch["command"]
    saved = torch.load(whole / "checkpoint-last.pt", weights_only=True)
    assert saved["launch"] == launch
    assert saved["settings"]["epochs"] == 3

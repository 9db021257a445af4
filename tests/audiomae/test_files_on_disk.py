"""Files that appear whole or not at all, checksums, the lock on a folder, and signals of reading processes."""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from audiomae.atomic import NoSpaceError, remove_leftovers, replacing
from audiomae.checkpoints import CheckpointError
from audiomae.checkpoints.checksum import checksum_matches, has_checksum, save_with_checksum
from audiomae.checkpoints.files import BrokenFileError, load_pickle
from audiomae.training.folder import LOCK, FolderInUseError, RunFolder
from audiomae.training.launch import source_commit
from audiomae.training.signals import StopRequest, shield_worker


def write_half(path: Path, error: Exception) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_file_is_replaced_at_the_end_and_an_error_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(ZeroDivisionError):
        write_half(path, ZeroDivisionError())
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError, match=f"no such directory: {tmp_path / 'none'}"):
        write_half(tmp_path / "none" / "file", ZeroDivisionError())


def test_the_old_file_can_stay_under_another_name(tmp_path: Path) -> None:
    path, previous = tmp_path / "file", tmp_path / "previous"
    for content in ("1", "2", "3"):
        with replacing(path, previous=previous) as temporary:
            temporary.write_text(content)
    assert (path.read_text(), previous.read_text()) == ("3", "2")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_is_told_with_what_to_do(number: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    told = r"no space is left to write .*file \([\d,]+ MiB are free\): every file that was there is whole; make room"
    with pytest.raises(NoSpaceError, match=f"^{told}"):
        write_half(path, OSError(number, os.strerror(number)))
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_other_errors_of_the_file_system_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="mine"):
        write_half(tmp_path / "file", PermissionError(errno.EACCES, "mine"))


def test_only_what_was_left_half_written_is_removed(tmp_path: Path) -> None:
    for name in ("a.pt.12.tmp", "b.tar.gz.7.tmp", "notes.tmp", "c.pt.old.tmp", "d.12", "12.tmp"):
        (tmp_path / name).write_text("")
    assert sorted(remove_leftovers(tmp_path)) == [tmp_path / "a.pt.12.tmp", tmp_path / "b.tar.gz.7.tmp"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["12.tmp", "c.pt.old.tmp", "d.12", "notes.tmp"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "state.pt"
    save_with_checksum({"model": torch.arange(5), "step": 3}, path)
    return path


def test_a_file_with_a_checksum_is_read_by_all(saved: Path) -> None:
    assert has_checksum(saved)
    assert checksum_matches(saved)
    assert load_pickle(saved)["step"] == 3
    assert torch.load(saved, weights_only=True)["model"].tolist() == [0, 1, 2, 3, 4]
    assert torch.load(saved, weights_only=True, mmap=True)["step"] == 3
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")


def test_every_flipped_bit_and_every_cut_is_found(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    path = tmp_path / "state.pt"

    def is_whole(changed: bytes) -> bool:
        path.write_bytes(changed)
        return has_checksum(path) and checksum_matches(path)

    assert is_whole(content)
    assert not any(is_whole(content[:length]) for length in range(len(content)))
    for place in range(len(content)):
        # All bits of the first and last bytes, where the archive's directory and the checksum are, else one.
        for bit in range(8) if place < 64 or len(content) - place < 400 else (place % 8,):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            assert not is_whole(changed), (place, bit)


def test_a_broken_file_is_told_apart_from_one_that_is_none(saved: Path, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(BrokenFileError, match=r"flipped\.pt is corrupt: its bytes do not match its checksum"):
        load_pickle(tmp_path / "flipped.pt")
    torch.save([1], tmp_path / "list.pt")
    assert not has_checksum(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds list, expected a dictionary") as error:
        load_pickle(tmp_path / "list.pt")
    assert not isinstance(error.value, BrokenFileError)


def test_pictures_that_were_left_half_written_are_removed_and_other_runs_left_alone(tmp_path: Path) -> None:
    for folder in ("pictures", "other-run"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png.12.tmp").write_text("")
    with RunFolder(tmp_path) as folder:
        folder.lock()
    assert folder.notes == ["removed what a killed run left half written: pictures/a.png.12.tmp"]
    assert not (tmp_path / "pictures" / "a.png.12.tmp").exists()
    assert (tmp_path / "other-run" / "a.png.12.tmp").exists()


def test_a_whole_file_that_cannot_be_loaded_is_not_called_broken(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nand so on"), MemoryError()):
        monkeypatch.setattr(torch, "load", Mock(side_effect=error))
        with pytest.raises(CheckpointError, match=r"is as it was written, but cannot be loaded: .*emory") as info:
            load_pickle(saved)
        assert not isinstance(info.value, BrokenFileError)
        assert "\n" not in str(info.value)


HOLD = """
import socket, sys, time
from pathlib import Path
from audiomae.training.folder import RunFolder
if len(sys.argv) > 3:
    socket.gethostname = lambda: sys.argv[3]
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_the_lock_of_another_machine_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hold() -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path), "600", "node7"]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        return holder

    with hold() as holder, RunFolder(tmp_path) as folder, monkeypatch.context() as patched:
        patched.setattr(time, "sleep", lambda seconds: holder.kill())
        folder.lock()
    told = re.escape(str(tmp_path)) + r" is in use by process \d+ on node7 since .*: waiting 120 s for it\n"
    assert re.fullmatch(told, capsys.readouterr().err)

    monkeypatch.setattr("audiomae.training.folder.LEASE", 0.5)
    with hold() as holder:
        with pytest.raises(FolderInUseError, match="on node7 since"), RunFolder(tmp_path) as folder:
            folder.lock()
        holder.kill()


def test_a_lock_is_held_by_a_living_process_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(FolderInUseError, match=rf"run is in use by process {holder.pid} on .* since 20"):
            RunFolder(tmp_path / "run").lock()
        holder.kill()
    (tmp_path / "run" / "checkpoint-last.pt.5.tmp").write_bytes(b"")
    with RunFolder(tmp_path / "run") as folder:
        folder.lock()
        assert folder.notes == ["removed what a killed run left half written: checkpoint-last.pt.5.tmp"]
        assert f'"process": {os.getpid()}' in (tmp_path / "run" / LOCK).read_text()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    folder = RunFolder(tmp_path)
    folder.lock()
    assert folder.notes == [f"the file system of {tmp_path} has no locks: see to it that no other run writes there"]


def test_a_stop_is_asked_for_and_a_second_interrupt_is_one() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def _read_for_ever(ready: "multiprocessing.synchronize.Event") -> None:
    shield_worker(0)
    ready.set()
    time.sleep(600)


def test_a_reading_process_ends_with_its_parent_alone() -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_read_for_ever, args=(ready,))
    worker.start()
    assert ready.wait(60)
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.exitcode is None
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_the_commit_is_that_of_this_checkout_or_none() -> None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    assert source_commit() == (done.stdout.strip() or None)

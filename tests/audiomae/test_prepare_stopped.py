import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from audiomae.data.preparation import conversion
from audiomae.data.preparation.conversion import Converter
from audiomae.data.preparation.folder import PreparedFolder
from audiomae.data.preparation.journal import Journal
from audiomae.data.prepare import main

from .preparing import make_sounds, noise, run_prepare, state


@pytest.fixture
def sounds(tmp_path) -> Path:
    return make_sounds(tmp_path / "sounds")


def in_child(work: Callable[[], None]) -> int:
    """Run something in a process of its own, and return its exit status, or the negative number of a signal."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


KILLED_IN = {"writing": (sf.SoundFile, "write"), "journal": (Journal, "add"), "naming": (os, "replace")}


@pytest.mark.parametrize("where", KILLED_IN)
def test_a_killed_run_goes_on(sounds, tmp_path, capsys, where):
    out = tmp_path / "out"

    def killed(at: int) -> None:
        owner, name = KILLED_IN[where]
        original, calls = getattr(owner, name), iter(range(100))

        def dying(*args, **kwargs):
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, dying)
        main([str(sounds), str(out), "--workers", "0"])

    for at in (0, 2, 2):
        before = state(out)
        assert in_child(lambda at=at: killed(at)) == -signal.SIGKILL
        after = {name: entry for name, entry in state(out).items() if not name.startswith(".prepare")}
        assert {name: after[name] for name in before if name in after} == {
            name: entry for name, entry in before.items() if name in after
        }
        for name in after:
            sound, _ = sf.read(out / name, dtype="int16")
            np.testing.assert_array_equal(sound, sf.read((sounds / name).with_suffix(".wav"), dtype="int16")[0])
    before = {name: entry for name, entry in state(out).items() if not name.startswith(".prepare")}
    assert len(before) >= 3
    assert not (out / "manifest.csv").exists()
    code, printed, _ = run_prepare(capsys, sounds, out)
    assert code == 0
    assert f"written {6 - len(before)}, there already {len(before)}, failed 0\n" in printed
    assert {name: entry for name, entry in state(out).items() if name in before} == before
    assert sorted(os.listdir(out)) == [
        ".prepare", "0.flac", "2.flac", "4.flac", "clipped.csv", "failed.csv", "manifest.csv", "prepare.json",
        "report.json", "sub",
    ]  # fmt: skip
    assert all(name == "lock" or name.startswith("journal-") for name in os.listdir(out / ".prepare"))


def test_an_interrupted_run_says_how_to_go_on(sounds, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        convert = Converter._convert

        def interrupted(self: Converter, clip: int):
            if clip == 3:
                raise KeyboardInterrupt
            return convert(self, clip)

        patch.setattr(Converter, "_convert", interrupted)
        code, printed, err = run_prepare(capsys, sounds, tmp_path / "out")
    assert (code, printed, err) == (130, "", "audiomae.data.prepare: interrupted; the same command goes on\n")
    assert "written 3, there already 3" in run_prepare(capsys, sounds, tmp_path / "out")[1]


def test_a_full_disk(sounds, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        fsync = os.fsync

        def full(descriptor: int) -> None:
            if next(calls) >= 4:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        patch.setattr(conversion.os, "fsync", full)
        code, printed, err = run_prepare(capsys, sounds, out)
    assert (code, printed) == (2, "")
    assert err.startswith(f"audiomae.data.prepare: error: no space is left in {out} (")
    assert err.endswith("every file there is whole; make room and run the same command again, which goes on\n")
    kept = len(state(out))
    assert 0 < kept < 6
    assert not (out / "manifest.csv").exists()
    assert f"written {6 - kept}, there already {kept}" in run_prepare(capsys, sounds, out)[1]


def test_a_file_that_libsndfile_cannot_write(tmp_path, capsys, monkeypatch):
    (tmp_path / "sounds").mkdir()
    sf.write(tmp_path / "sounds" / "a.wav", noise(0, 300_000), 16_000)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with (tmp_path / "err").open("w") as sys.stderr:
            main([str(tmp_path / "sounds"), str(tmp_path / "out"), "--workers", "0"])

    assert in_child(limited) == 2
    err = (tmp_path / "err").read_text()
    assert f"error: {tmp_path / 'out'} cannot be written ([Errno 27] File too large): every file there is whole" in err
    assert state(tmp_path / "out") == {}


def test_a_file_system_without_locks_is_told_of(sounds, tmp_path, capsys, monkeypatch):
    def without(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", without)
    code, _, err = run_prepare(capsys, sounds, tmp_path / "out")
    assert code == 0
    told = f"the file system of {tmp_path / 'out'} has no locks: see to it that no other run writes there"
    assert err == f"audiomae.data.prepare: {told}\n"


def test_two_runs_at_once(sounds, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_prepare(capsys, sounds, out)[0] == 0
    ready, done = multiprocessing.Pipe()

    def hold() -> None:
        with PreparedFolder(out, {}):
            ready.send(None)
            ready.recv()

    child = multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    done.recv()
    code, _, err = run_prepare(capsys, sounds, out)
    done.send(None)
    child.join(60)
    assert code == 2
    assert err == f"audiomae.data.prepare: error: another process prepares clips in {out}: wait for it to end\n"
    assert run_prepare(capsys, sounds, out)[0] == 0

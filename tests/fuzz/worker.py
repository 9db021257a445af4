"""A process that reads hostile inputs in place of the one that makes them, under limits, and may die of them."""

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 10.0
"""The most that one input may take; a machine that is busy needs some of them."""
MIB = 512
"""The most address space that one input may take on top of what the process has."""

LONGEST = 2000
"""Characters of a refusal's message, which has one line."""

# Events of Python's audit hooks that reading a file has no reason for: processes, sockets, and the unpickler of the
# standard library, which looks up any class. A file that is opened to be written counts, too.
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "subprocess.Popen", "pty.spawn"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "webbrowser.open", "shutil.rmtree"),
    *("pickle.find_class", "sys.settrace", "sys.setprofile", "os.putenv", "os.unsetenv"),
)

FAILURES = ("escaped", "unclear", "ran code", "crashed", "too slow")
"""Another error than a refusal; a refusal of many lines; something of ``FORBIDDEN``; the process died, or was ended."""

Read = Callable[[Path], object]
Write = Callable[[Path, Any], object]


@dataclass(frozen=True)
class Target:
    """What is done with an input. All functions are found by name in the other process.

    Attributes:
        write: Writes the files of an input into an empty folder.
        read: Each reads them and checks what it gets. An input that one of them gives a result of is a result.
        refusals: Errors by which a reader may refuse an input.
    """

    write: Write
    read: Sequence[Read]
    refusals: tuple[type[Exception], ...]


class Outcome(NamedTuple):
    """How one input ended.

    Attributes:
        kind: ``"result"``, the name of the class of a refusal, or one of ``FAILURES``.
        text: The message of a refusal; what went wrong in a failure.
        seconds: Processor time that it took, which a busy machine does not change.
        mib: Memory at its highest above what there was before, MiB.
    """

    kind: str
    text: str = ""
    seconds: float = 0.0
    mib: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether it is neither a result nor a refusal."""
        return self.kind in FAILURES


class Worker:
    """Runs targets on inputs in another process, which is started anew where an input ends it."""

    def __init__(self, seconds: float = SECONDS, mib: int = MIB):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([f"{__package__}.preload"])
        self._limits = seconds, mib
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection

    def run(self, target: Target, case: Any) -> Outcome:
        """Run a target on an input.

        Raises:
            RuntimeError: The test could not write it.
        """
        if self._process is None:
            self._connection, there = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(there, self._limits[1]), daemon=True)
            self._process.start()
            there.close()
            self._connection.recv()  # it has loaded what it needs
        seconds = self._limits[0]
        try:
            self._connection.send((target, case))
            if self._connection.poll(seconds):
                outcome = self._connection.recv()
                if outcome.kind == "broken":
                    raise RuntimeError(f"the test itself failed: {outcome.text}")
                return outcome
        except (EOFError, ConnectionError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            return Outcome("crashed", f"the process ended with {code}")
        self.close()
        return Outcome("too slow", f"more than {seconds:g} s", seconds)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Connection, mib: int) -> None:
    import torch

    from . import preload  # noqa: F401 - where it was not found from the working directory

    torch.set_num_threads(1)
    for stream in (1, 2):  # on which libraries in C complain of what they read
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.dont_write_bytecode = True  # of what is imported while the guard watches
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    guard = _Guard()
    sys.addaudithook(guard)
    connection.send("ready")
    while True:
        try:
            target, case = connection.recv()
        except EOFError:
            return
        folder = Path(tempfile.mkdtemp(prefix="audiomae-fuzz-"))
        try:
            connection.send(_run(target, case, folder, guard, mib))
        except Exception:
            connection.send(Outcome("broken", traceback.format_exc()))
        finally:
            shutil.rmtree(folder)


class _Guard:
    """An audit hook that notes what an input must not make its reader do."""

    def __init__(self) -> None:
        self.watching = False
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.watching and (event in FORBIDDEN or (event == "open" and _writes(*args))):
            self.seen.append(f"{event}{args}")


def _writes(path: Any, mode: str | None, flags: int) -> bool:
    return path != os.devnull and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) != 0


def _run(target: Target, case: Any, folder: Path, guard: _Guard, mib: int) -> Outcome:
    target.write(folder, case)
    os.chdir(folder)
    before = set(folder.rglob("*"))
    guard.seen.clear()
    _reset_peak()
    memory, started = _memory("VmHWM"), time.process_time()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(_memory("VmSize") + mib) << 20, limit[1]))
    kinds: list[str] = []
    texts: list[str] = []
    for read in target.read:
        guard.watching = True
        try:
            read(folder)
            kind, text = "result", ""
        except target.refusals as error:
            text = str(error)
            is_clear = len(text.splitlines()) == 1 and len(text) <= LONGEST
            kind = type(error).__name__ if is_clear else "unclear"
        except BaseException:
            kind, text = "escaped", traceback.format_exc()
        finally:
            guard.watching = False
        kinds.append(kind)
        texts.append(text)
    resource.setrlimit(resource.RLIMIT_AS, limit)
    cost = time.process_time() - started, _memory("VmHWM") - memory
    made = set(folder.rglob("*")) - before
    if guard.seen or made:
        return Outcome("ran code", "; ".join([*guard.seen, *map(str, made)]), *cost)
    worst = next((kind for kind in ("escaped", "unclear", "result") if kind in kinds), kinds[0])
    return Outcome(worst, texts[kinds.index(worst)], *cost)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> float:
    """A field of this process's status, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {field} in /proc/self/status")

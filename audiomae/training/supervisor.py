"""What surrounds a training run: the lock on its folder, signals, the watch over its ranks, and saves."""

from contextlib import ExitStack
from functools import partial
from typing import Any, Self

from audiomae.training.command import agree
from audiomae.training.config import JoinError, RunConfig
from audiomae.training.distributed import Ranks
from audiomae.training.folder import RunFolder
from audiomae.training.launch import describe_launch
from audiomae.training.rollcall import WAITING_FOR_RANKS
from audiomae.training.signals import StopRequest
from audiomae.training.state import (
    LAST,
    Model,
    Resumed,
    State,
    find_checkpoints,
    save_settings,
    save_state,
    set_aside,
    stamp,
)
from audiomae.training.store import open_store
from audiomae.training.watchdog import Watchdog


class Supervisor:
    """Surrounds a run within a ``with`` statement, on every rank.

    Args:
        config: The run.
        ranks: This process among the others.
        resumed: Where it goes on; None for a new run.

    Attributes:
        folder: The output folder.
        launch: With what this process was started; empty on ranks that do not save.
        notes: Lines that tell what was found in the output folder.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, resumed: Resumed | None = None):
        self.folder = config.output_dir
        self.launch = describe_launch(ranks) if ranks.main else {}
        self.notes: list[str] = []
        self._config, self._ranks = config, ranks
        self._resumed = resumed
        self._last_step: int | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Lock the output folder, and watch over signals and ranks.

        Raises:
            SetupError: Another process has the folder or had it until now, it cannot be written, or ranks do not come.
        """
        folder = RunFolder(self.folder)
        self._open.push(folder)
        agree(self._ranks, partial(self._take, folder) if self._ranks.main else (lambda: None))
        self._stop = self._open.enter_context(StopRequest())
        try:
            store = open_store(self._ranks.rank, self._ranks.world_size)
        except TimeoutError as error:
            raise JoinError(str(error)) from error
        self.watchdog = self._open.enter_context(
            Watchdog(
                store,
                self._ranks.rank,
                self._ranks.world_size,
                timeout=self._config.hang_timeout,
                report=self.folder,
            )
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def _take(self, folder: RunFolder) -> None:
        """Lock the folder, which must be as it was when this run looked for what to go on from."""
        folder.lock()
        self.notes = folder.notes
        found = [] if self._resumed is None else self._resumed.found
        own = [entry for entry in found if entry[0].parent == self.folder]
        if stamp([path for path in find_checkpoints(self._config) if path.parent == self.folder]) != own:
            raise FileExistsError(f"another run saved to {self.folder} while this one began: start this one again")
        if self._resumed is not None:
            self.notes += set_aside(self._resumed.broken, self.folder)

    @property
    def stop(self) -> int:
        """Number of the signal that asked this process to stop; 0 before any."""
        return self._stop.number

    @property
    def last_save(self) -> str:
        """Tell which checkpoint is the last good one."""
        if self._last_step is not None:
            return f"the last good checkpoint is {self.folder / LAST}, of step {self._last_step}"
        if self._resumed is not None:
            return f"the last good checkpoint is {self._resumed.path}, of step {self._resumed.step}"
        return "no checkpoint was saved yet"

    def mark(self, step: int, doing: str) -> None:
        """Tell the other ranks that this one goes on.

        Args:
            step: The step that it is in.
            doing: What it does.
        """
        self.watchdog.mark(step, doing)

    def begin(self) -> None:
        """Write down the settings of the run and with what it was started."""
        if self._ranks.main:
            save_settings(self._config, self.launch)

    def saves_after(self, step: int) -> bool:
        """Whether the state is saved after a step within an epoch."""
        return bool(self._config.save_steps) and step % self._config.save_steps == 0

    def save(self, state: State, model: Model, *, keep: int | None = None) -> None:
        """Save the state of a run, which all ranks have made together; they wait until it is saved.

        Args:
            state: The state.
            model: Its model.
            keep: Number of an epoch whose state is kept under a name of its own too.
        """
        step = state.progress["step"]
        self.mark(step, "saving" if self._ranks.main else WAITING_FOR_RANKS)
        if self._ranks.main:
            save_state(self.folder, state, model, keep=keep)
        self._ranks.barrier()
        self._last_step = step


class NullSupervisor:
    """Takes the calls of a :class:`Supervisor` and does nothing."""

    launch: dict[str, Any] = {}  # noqa: RUF012 - it is never changed
    stop = 0
    last_save = "nothing is saved"

    def mark(self, step: int, doing: str) -> None:
        """Do nothing."""

    def saves_after(self, step: int) -> bool:
        """Never."""
        return False

    def save(self, state: State, model: Model, *, keep: int | None = None) -> None:
        """Do nothing."""

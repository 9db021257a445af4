"""The record of a run: a line of JSON a logged step, TensorBoard, pictures, and a progress display."""

import csv
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

SECONDS_BETWEEN_LINES = 10.0
LOG, EVALUATIONS = "log.jsonl", "evaluations.jsonl"


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, anew: bool = False) -> None:
    """Add rows to a CSV file, which begins with its columns; without rows, none is made.

    Args:
        path: The file.
        columns: Its header.
        rows: What to add.
        anew: Drop what the file holds.
    """
    if anew:
        path.unlink(missing_ok=True)
    rows = list(rows)
    if not rows:
        return
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names may hold bytes that are no UTF-8.
    with path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([columns, *rows] if new else rows)


class RunLog:
    """Writes down a run, in the process of the main rank; :class:`NullLog` is for the others.

    A context manager: leaving it closes the files, and the display stays as it was. It writes

    - ``log.jsonl``: one JSON object a logged step, with "step", "epoch", "loss", "lr", "clips_per_second", "waiting",
      "skipped", further scalars, and "time" in seconds since 1970. Steps ascend. A number that is not finite becomes
      ``null``.
    - ``evaluations.jsonl``: one JSON object an evaluation, with "step", "epoch", what it found, and "time".
    - ``skipped.csv`` and ``nonfinite.csv``, where there is something to tell: see :mod:`audiomae.training.faults`.
    - ``tensorboard/``: the same scalars, and the pictures.
    - ``pictures/``: ``<tag>-epoch-0010.png``, or ``<tag>-step-0001234.png`` from within an epoch.

    On a terminal, standard error shows a progress bar; elsewhere it gets one line at the first logged step, then at
    most one in 10 s, and one at the first logged step that ends an epoch or follows its end.

    Args:
        directory: Where to write; made if missing.
    """

    _display: "_ProgressBar | _ProgressLines"
    _tensorboard: "SummaryWriter"

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._console = Console(stderr=True)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Open the log.

        Raises:
            OSError: The directory cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = self._open.enter_context((self.directory / LOG).open("a", encoding="utf-8"))
        except OSError as error:
            raise OSError(f"cannot write the log of a run to {self.directory}: {error.strerror}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def start(self, *, total_steps: int, first_step: int, steps_per_epoch: int, epochs: int) -> None:
        """Begin or resume the record. Steps count from 1: step n is the nth update of the parameters.

        What an earlier process logged after ``first_step`` is dropped, for those steps are taken again.

        Args:
            total_steps: Steps of the whole run.
            first_step: Steps already taken: 0, or where the run resumes.
            steps_per_epoch: Steps of an epoch.
            epochs: Epochs of the whole run.

        Raises:
            ValueError: The log of an earlier process is not one of ours.
        """
        for name in (LOG, EVALUATIONS):
            dropped = _cut(self.directory / name, first_step)
            if dropped:
                self.message(f"{name}: dropped {dropped} line{'s' * (dropped > 1)} after step {first_step}")
        self._steps_per_epoch = steps_per_epoch
        self._last_step = first_step
        self._tensorboard = _open_tensorboard(self.directory / "tensorboard", purge_step=first_step + 1)
        self._open.callback(self._tensorboard.close)
        display = _ProgressBar if self._console.is_interactive and sys.stderr.isatty() else _ProgressLines
        self._display = display(self._console, total_steps, first_step, steps_per_epoch, epochs)
        self._open.callback(self._display.close)

    def step(
        self,
        *,
        step: int,
        epoch: float,
        loss: float,
        lr: float,
        clips_per_second: float,
        waiting: float,
        skipped: int = 0,
        **scalars: float,
    ) -> None:
        """Log a step. Reading its loss waits for the device, so do this now and then only.

        Args:
            step: Its number.
            epoch: The epoch that it is of.
            loss: Mean since the last logged step.
            lr: Learning rate.
            clips_per_second: Of all ranks, since the last logged step.
            waiting: Share of the time since then that the main rank waited for data, 0 to 1.
            skipped: Clips that could not be read until now.
            scalars: What else there is.

        Raises:
            TypeError: A value is not a Python number.
            ValueError: The step is not after the last one logged.
        """
        if step <= self._last_step:
            raise ValueError(f"step is {step}, expected one after {self._last_step}, which is logged or resumed from")
        rates = {"clips_per_second": clips_per_second, "waiting": waiting, "skipped": skipped}
        values = {"epoch": epoch, "loss": loss, "lr": lr, **rates, **scalars}
        for name, value in values.items():
            if not isinstance(value, int | float):
                raise TypeError(f"{name} is of {type(value)}, expected a Python number")
        self._last_step = step
        print(_record(step, values), file=self._file, flush=True)
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        texts = [f"loss {loss:.4f}", f"lr {lr:.2e}", f"{clips_per_second:,.0f} clips/s", f"waiting {waiting:.0%}"]
        texts += [f"skipped {skipped}"] if skipped else []
        self._display.step(step, "  ".join([*texts, *(f"{name} {value:.4g}" for name, value in scalars.items())]))

    def evaluation(self, *, step: int, epoch: int, **values: float) -> None:
        """Log what an evaluation after a step found, and show it."""
        with (self.directory / EVALUATIONS).open("a", encoding="utf-8") as file:
            print(_record(step, {"epoch": epoch, **values}), file=file)
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self.message(f"epoch {epoch}: {'  '.join(f'{name} {value:.4f}' for name, value in values.items())}")

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, anew: bool = False) -> None:
        """Add rows to a CSV file of the directory, which begins with its columns.

        Args:
            name: Of the file. Without rows, none is made.
            columns: Its header.
            rows: What to add.
            anew: Drop what the file holds.
        """
        write_table(self.directory / name, columns, rows, anew=anew)

    def advance(self, step: int) -> None:
        """Tell the display that ``step`` is done. Call it at every step: it takes microseconds."""
        self._display.advance(step)

    def message(self, text: str) -> None:
        """Show a line of text, above the progress bar if there is one."""
        self._console.out(text, highlight=False)

    def picture(self, tag: str, figure: "Figure", step: int) -> None:
        """Save a figure as a PNG file and to TensorBoard."""
        from audiomae.training.pictures import figure_to_array, save_figure

        epoch, rest = divmod(step, self._steps_per_epoch)
        when = f"step-{step:07d}" if rest else f"epoch-{epoch:04d}"
        save_figure(figure, self.directory / "pictures" / f"{tag}-{when}.png")
        self._tensorboard.add_image(tag, figure_to_array(figure), step, dataformats="HWC")


class NullLog:
    """Takes the calls of a :class:`RunLog` and does nothing: the log of every rank but the main one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def start(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""

    step = evaluation = table = advance = message = picture = start


class _Pace:
    """Predicts the time that is left, in seconds, from the speed of about the last minute."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        # Filled from the end of the first step on, which may take minutes to compile. Marks are a second or more apart,
        # so that even very slow steps leave two of them.
        self._marks: deque[tuple[float, int]] = deque(maxlen=60)

    def advance(self, step: int) -> float | None:
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append((now, step))
        past, past_step = self._marks[0]
        return (now - past) / (step - past_step) * (self._total_steps - step) if step > past_step else None


class _ProgressLines:
    """Plain lines, for files."""

    def __init__(self, console: Console, total_steps: int, first_step: int, steps_per_epoch: int, epochs: int) -> None:
        self._console = console
        self._total_steps, self._steps_per_epoch, self._epochs = total_steps, steps_per_epoch, epochs
        self._pace = _Pace(total_steps)
        self._start = time.monotonic()
        self._printed_step, self._printed_time = first_step, -math.inf
        self._pending: str | None = None

    def step(self, step: int, text: str) -> None:
        now = time.monotonic()
        times = f"elapsed {_clock(now - self._start)}  ETA {_clock(self._pace.advance(step))}"
        epoch = -(-step // self._steps_per_epoch)
        self._pending = f"epoch {epoch}/{self._epochs}  step {step}/{self._total_steps}  {text}  {times}"
        epoch_ended = step // self._steps_per_epoch > self._printed_step // self._steps_per_epoch
        if epoch_ended or now - self._printed_time >= SECONDS_BETWEEN_LINES:
            self._printed_step, self._printed_time = step, now
            self._print()

    def advance(self, step: int) -> None:
        self._pace.advance(step)

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        if self._pending is not None:
            self._console.out(self._pending, highlight=False)
            self._pending = None


class _ProgressBar:
    """A bar with the values last logged below it, for terminals."""

    def __init__(self, console: Console, total_steps: int, first_step: int, steps_per_epoch: int, epochs: int) -> None:
        self._steps_per_epoch, self._epochs = steps_per_epoch, epochs
        self._pace = _Pace(total_steps)
        self._progress = Progress(
            TextColumn(f"epoch {{task.fields[epoch]}}/{epochs}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[left]}", style="progress.remaining"),
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, epoch=1, left="")
        self._show(first_step, None)
        self._values = Text(no_wrap=True, overflow="ellipsis")
        # Standard output stays apart from standard error where it goes elsewhere.
        self._live = Live(Group(self._progress, self._values), console=console, redirect_stdout=sys.stdout.isatty())
        self._live.start(refresh=True)

    def step(self, step: int, text: str) -> None:
        self._values.plain = text

    def advance(self, step: int) -> None:
        self._show(step, self._pace.advance(step))

    def close(self) -> None:
        self._live.stop()

    def _show(self, step: int, left: float | None) -> None:
        epoch = min(step // self._steps_per_epoch + 1, self._epochs)
        self._progress.update(self._task, completed=step, epoch=epoch, left=_clock(left))


def _cut(path: Path, last_step: int) -> int:
    """Cut a log after ``last_step``, and where a killed process left a line unfinished; return the lines dropped.

    Raises:
        ValueError: A line is not the record of a step.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = size = 0
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            if json.loads(line)["step"] > last_step:
                break
        except (ValueError, TypeError, KeyError):
            found = line[:60].decode(errors="replace").strip()
            raise ValueError(f"{path}:{kept + 1}: expected a JSON object with a step, found {found!r}") from None
        kept += 1
        size += len(line)
    os.truncate(path, size)
    return len(lines) - kept


def _record(step: int, values: dict[str, float]) -> str:
    """A line of a log; JSON has no number that is not finite."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": step, **finite, "time": round(time.time(), 3)}, allow_nan=False)


def _open_tensorboard(directory: Path, purge_step: int) -> "SummaryWriter":
    # With this module present, TensorBoard does not load an installed TensorFlow, which takes seconds, prints warnings
    # and initialises the GPU, only to write files.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=purge_step, flush_secs=30)


def _clock(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None:
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"

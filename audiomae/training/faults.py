"""What goes wrong in a run and does not end it: clips that cannot be read, and steps that are not finite."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from audiomae.data import Batch, Manifest
from audiomae.training.config import RunConfig
from audiomae.training.distributed import Ranks, is_main_process
from audiomae.training.logging import NullLog, RunLog, write_table
from audiomae.training.progress import Progress
from audiomae.training.supervisor import NullSupervisor, Supervisor
from audiomae.training.verdict import Verdict

SKIPPED = ("skipped.csv", ("step", "clip", "path", "reason"))
NONFINITE = ("nonfinite.csv", ("step", "clip", "path"))
NAMES = 5
"""Names that a message has at most; the files have all."""


class TooManySkippedError(RuntimeError):
    """More clips than allowed cannot be read."""


def report_unread(unread: Mapping[int, str], manifest: Manifest, limit: float, split: str, folder: Path) -> list[str]:
    """Write down and return which clips of a split that was evaluated cannot be read; nothing where all can.

    Args:
        unread: Numbers of the clips, and what is wrong with each.
        manifest: All clips.
        limit: Share of them that may be left out.
        split: Its name.
        folder: Where the main rank names all of them in a ``skipped.csv``.

    Raises:
        TooManySkippedError: They are more than that.
    """
    name, columns = SKIPPED
    if is_main_process():
        rows = [(clip, manifest.path(clip), reason) for clip, reason in unread.items()]
        write_table(folder / name, columns[1:], rows, anew=True)
    if not unread:
        return []
    named = [f"{manifest.path(clip)}: {reason}" for clip, reason in list(unread.items())[:NAMES]]
    more = f"; and {len(unread) - NAMES} more, which {folder / name} names" if len(unread) > NAMES else ""
    what = f"{len(unread)} of the {len(manifest)} clips of {split} cannot be read"
    if len(unread) > limit * len(manifest):
        raise TooManySkippedError(f"{what}, more than the {limit:.2%} of max_skipped: {'; '.join(named)}{more}")
    return [f"{what} and are left out: {'; '.join(named)}{more}"]


class Faults:
    """Counts and names them, the same on all ranks.

    Args:
        config: The run, which says how many there may be.
        ranks: This process among the others.
        manifest: The clips.
        epoch_clips: Clips of an epoch.
        progress: Of the run; faults are added to it.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, manifest: Manifest, epoch_clips: int, progress: Progress):
        self._config, self._ranks, self._manifest, self._progress = config, ranks, manifest, progress
        self._epoch_clips = epoch_clips
        # What this rank has met and not yet told to the others.
        self._visits = 0
        self._met: dict[int, tuple[int, str]] = {}
        self._told = 0

    def start(self, log: RunLog | NullLog) -> None:
        """Write down what an earlier process of the run has met."""
        unread = self._progress.unread
        log.table(*SKIPPED, self._skipped_rows(list(unread)), anew=True)
        nonfinite = [row for step, clips in self._progress.nonfinite.items() for row in self._rows(step, clips)]
        log.table(*NONFINITE, nonfinite, anew=True)
        if unread:
            log.message(f"{len(unread)} of {len(self._manifest)} clips were skipped so far: {SKIPPED[0]} names them")

    def begin_epoch(self) -> None:
        """Count skipped visits anew."""
        self._progress.skipped_visits = 0

    def meet(self, step: int, batch: Sequence[Batch]) -> None:
        """Note which clips were to be in this rank's share of a batch and cannot be read."""
        for clip, reason in (unread for part in batch for unread in part.unread):
            self._visits += 1
            if clip not in self._progress.unread:
                self._met.setdefault(clip, (step, reason))

    def settle(self, log: RunLog | NullLog) -> None:
        """Exchange what each rank has met, write it down, and tell of the first ones; all ranks take part.

        Raises:
            TooManySkippedError: They are more than there may be.
        """
        met: dict[int, tuple[int, str]] = {}
        for visits, share in self._ranks.gather((self._visits, self._met)):
            self._progress.skipped_visits += visits
            for clip, found in share.items():
                met[clip] = min(found, met.get(clip, found))
        self._visits, self._met = 0, {}
        unread = self._progress.unread
        new = sorted(met.keys() - unread.keys(), key=lambda clip: (met[clip][0], clip))
        unread.update((clip, met[clip]) for clip in new)
        rows = self._skipped_rows(new)
        log.table(*SKIPPED, rows)
        for _, _, path, reason in rows[: max(NAMES - self._told, 0)]:
            log.message(f"skipped {path}: {reason}")
        if self._told < NAMES < self._told + len(rows):
            log.message(f"further ones are in {SKIPPED[0]} alone")
        self._told += len(rows)
        # Visits, not clips: one silent place in a long recording that is visited often does not count for all of it.
        count, limit = self._progress.skipped_visits, self._config.max_skipped
        if count > limit * self._epoch_clips:
            raise TooManySkippedError(
                f"{count} of the {self._epoch_clips} clips of an epoch cannot be read, more than the {limit:.2%} of "
                f"max_skipped: {self._config.output_dir / SKIPPED[0]} names them"
            )

    def judge(self, verdict: Verdict, log: RunLog | NullLog, supervisor: Supervisor | NullSupervisor) -> None:
        """Note a step that is not finite; all ranks take part.

        Raises:
            FloatingPointError: There are more such steps than may be left out.
        """
        if verdict.finite:
            return
        met, spoilt = zip(*self._ranks.gather((verdict.clips, verdict.spoilt)), strict=True)
        # Where every loss was finite and a gradient was not, it may come from any clip.
        clips = sorted(chain.from_iterable(spoilt if any(spoilt) else met))
        self._progress.nonfinite[verdict.step] = clips
        log.table(*NONFINITE, self._rows(verdict.step, clips))
        paths = [self._manifest.path(clip) for clip in clips[:NAMES]]
        more = f" and {len(clips) - NAMES} more ({NONFINITE[0]} names them)" if len(clips) > NAMES else ""
        what = f"the loss or its gradient is not finite at step {verdict.step}, with {', '.join(paths)}{more}"
        count, limit = len(self._progress.nonfinite), self._config.skip_nonfinite
        if count > limit:
            raise FloatingPointError(
                f"{what}; {supervisor.last_save}; lower the learning rate or clip gradients, or leave out "
                f"up to N such steps with --skip-nonfinite N"
            )
        log.message(f"{what}: left out, {count} of {limit} that may be")

    def _skipped_rows(self, clips: Sequence[int]) -> list[tuple[Any, ...]]:
        unread = self._progress.unread
        return [(unread[clip][0], clip, self._manifest.path(clip), unread[clip][1]) for clip in clips]

    def _rows(self, step: int, clips: Sequence[int]) -> list[tuple[Any, ...]]:
        if not clips:  # of another list of clips, which an earlier process had
            return [(step, None, None)]
        return [(step, clip, self._manifest.path(clip)) for clip in clips]

"""What the readers of data sets share: what was asked for, what is at hand, and the task that comes of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from audiomae.data.labels import LabelError, Labels, labels_found
from audiomae.data.manifests import Clip, Manifest, ManifestError


@dataclass(frozen=True)
class Task:
    """A labelled data set, split for training and evaluation.

    Attributes:
        name: Name of the data set.
        labels: The classes.
        train: Clips to train on.
        valid: Clips that choose the best epoch, if the data set has such a split.
        test: Clips to report on.
        notes: Lines that a run prints: counts, what was left out and why, and how the protocol splits.
    """

    name: str
    labels: Labels
    train: Manifest
    valid: Manifest | None
    test: Manifest | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What is to be read; the arguments of ``read_task``."""

    name: str
    root: Path = Path()
    fold: int | None = None
    labels: Path | None = None
    valid: Path | None = None
    test: Path | None = None
    seed: int = 0
    allow_outside: bool = False


@dataclass(frozen=True)
class Part:
    """A list of clips of a data set, and what of it is at hand.

    Attributes:
        name: What it is.
        manifest: The clips at hand, if there are any.
        missing: Names of those that are listed and not at hand.
        published: How many the complete data set has; None where nobody published it.
        looked_for: Whether files were looked for; otherwise all count as at hand.
    """

    name: str
    manifest: Manifest | None
    missing: tuple[str, ...] = ()
    published: int | None = None
    looked_for: bool = True

    @property
    def at_hand(self) -> int:
        """Clips at hand."""
        return 0 if self.manifest is None else len(self.manifest)

    @property
    def listed(self) -> int:
        """Clips in the list."""
        return self.at_hand + len(self.missing)


@dataclass(frozen=True)
class Survey:
    """What a data set should hold and what of it is at hand.

    Attributes:
        request: What was asked for.
        labels: The classes.
        parts: Its lists of clips.
        num_classes: How many classes the complete data set has; None where nobody published it.
        notes: What else is worth knowing.
    """

    request: Request
    labels: Labels
    parts: tuple[Part, ...]
    num_classes: int | None = None
    notes: tuple[str, ...] = field(default=())

    def clips(self, name: str) -> Manifest:
        """The clips at hand of a part.

        Raises:
            ManifestError: None is.
        """
        part = next(part for part in self.parts if part.name == name)
        if part.manifest is not None:
            return part.manifest
        what = f"{self.request.root}: {part.name}"
        if not part.missing:
            raise ManifestError(f"{what}: no clips")
        raise ManifestError(f"{what}: none of the {part.listed:,} clips is at hand: no file of {part.missing[0]}")

    def task(
        self,
        train: Manifest,
        valid: Manifest | None = None,
        test: Manifest | None = None,
        notes: Iterable[str] = (),
    ) -> Task:
        """Make the task, with notes on what it holds and what was left out.

        Raises:
            LabelError: The training clips have no labels, or one alone.
        """
        name = self.request.name
        found = labels_found(train)
        if not found:
            raise LabelError(f"{name}: the training clips have no labels")
        if len(found) == 1:
            raise LabelError(
                f"{name}: all {len(train):,} training clips are of one class, {found.pop()!r}, expected two at least"
            )
        splits = {"train": train, "validate": valid, "test": test}
        counts = [f"{len(clips):,} to {use} on" for use, clips in splits.items() if clips is not None]
        lines = [f"{name}: {len(self.labels)} classes, clips: {', '.join(counts)}"]
        untrained = [label for key, label in zip(self.labels.keys, self.labels.names, strict=True) if key not in found]
        if untrained:
            lines.append(
                f"{name}: no training clips of {len(untrained)} of {len(self.labels)} classes: {shorten(untrained)}"
            )
        if any(part.missing for part in self.parts):
            left_out = [
                f"{len(part.missing):,} of {part.listed:,} ({part.name})" for part in self.parts if part.missing
            ]
            lines.append(
                f"{name}: clips listed but not at hand are left out: {', '.join(left_out)}; "
                f"python -m audiomae.data.check {name} {self.request.root} names them"
            )
        return Task(name, self.labels, train, valid, test, (*lines, *(f"{name}: {note}" for note in notes)))


def look_up(
    name: str,
    listed: Iterable[tuple[str, Iterable[str]]],
    at_hand: Mapping[str, str],
    root: Path,
    published: int | None = None,
) -> Part:
    """Find the clips of a list.

    Args:
        name: Name of the part.
        listed: (name, labels) of each clip.
        at_hand: Path of each clip at hand, relative to the root, by the name that lists give it.
        root: Folder that the paths start from.
        published: How many clips the complete list has.
    """
    missing: list[str] = []
    present: list[Clip] = []
    for clip, labels in listed:
        if clip in at_hand:
            present.append((at_hand[clip], tuple(labels)))
        else:
            missing.append(clip)
    return Part(name, Manifest(present, root) if present else None, tuple(missing), published)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a list.

    Raises:
        ManifestError: For one that is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeError as error:
        raise ManifestError(f"{path}: {error}") from error


def shorten(names: Iterable[str], count: int = 5) -> str:
    """Join names, the first few of many."""
    names = list(names)
    rest = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest

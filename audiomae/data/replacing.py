"""Clips that cannot be read: others take their places, and which ones they were is told with the batch."""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch.utils.data import Dataset, default_collate

from audiomae.data.manifests import Manifest
from audiomae.data.sound_files import ClipError
from audiomae.seeding import clip_generator

T_co = TypeVar("T_co", covariant=True)

_CANDIDATES = 100  # that cannot be read, one after the other, until there is something else wrong


class Visits(Protocol[T_co]):
    """Clips that are drawn by (epoch, clip), as ``ClipDataset`` and ``LabelledClips``."""

    @property
    def manifest(self) -> Manifest:
        """The clips."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: tuple[int, int], /) -> T_co:
        """Draw one, or raise ``ClipError``."""


class Unread(NamedTuple):
    """A clip that cannot be read.

    Attributes:
        clip: Its number in its manifest.
        reason: What is wrong with it, without its path.
    """

    clip: int
    reason: str


class Batch(NamedTuple):
    """Samples, and the clips that were to be among them.

    Attributes:
        data: The samples as ``default_collate`` puts them together.
        unread: Clips that cannot be read, in the order in which they were met; a clip can stand there more than once.
    """

    data: Any
    unread: tuple[Unread, ...]


class Replacing(Dataset[tuple[T_co, tuple[Unread, ...]]], Generic[T_co]):
    """Clips of which those that cannot be read are replaced.

    ``replacing[epoch, clip]`` gives (sample, clips that could not be read). In place of such a clip comes another one,
    any as likely as any other, as (visit, clip) with a visit below zero that no other replacement has: its crop, gain
    and mask are like those of no other visit. The pair in the sample holds these two. They come from the seed, the
    epoch, the clip, and which files can be read, so that batches are the same on any number of workers and ranks.

    Args:
        dataset: The clips; a ``ClipError`` that knows its clip, as of the partner of a mix, is told of that one.
        seed: Seed of the run.

    Raises:
        ClipError: On access, if of 100 clips in a row none can be read.
    """

    def __init__(self, dataset: Visits[T_co], seed: int = 0):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: tuple[int, int]) -> tuple[T_co, tuple[Unread, ...]]:
        try:
            return self.dataset[index], ()
        except ClipError as error:
            first, unread = error, [self._unread(error, index[1])]
        epoch, clip = index
        first_visit = -1 - _CANDIDATES * (epoch * len(self) + clip)
        draw = clip_generator(self.seed, epoch, clip, "replacement")
        for attempt in range(_CANDIDATES):
            other = int(draw.integers(len(self)))
            try:
                return self.dataset[first_visit - attempt, other], tuple(unread)
            except ClipError as error:
                unread.append(self._unread(error, other))
        raise _failure(first)

    def _unread(self, error: ClipError, clip: int) -> Unread:
        """What is to be told of an error that came up when a clip was read."""
        clip = clip if error.clip is None else error.clip
        return Unread(clip, str(error).removeprefix(f"{self.dataset.manifest.path(clip)}: "))


def _failure(first: ClipError) -> ClipError:
    failure = ClipError(f"{first}; nor can any of {_CANDIDATES} clips that were drawn in its place be read")
    failure.clip = first.clip
    return failure


def collate_visits(samples: Sequence[tuple[Any, tuple[Unread, ...]]]) -> Batch:
    """Put samples of ``Replacing`` together, for the ``collate_fn`` of a ``DataLoader``."""
    return Batch(
        default_collate([sample for sample, _ in samples]),
        tuple(unread for _, of_sample in samples for unread in of_sample),
    )

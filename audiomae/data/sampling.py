"""Which clips a batch holds."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from audiomae.seeding import epoch_generator


class ClipBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler: one rank's share of the shuffled global batches of an epoch, as lists of (epoch, clip) pairs.

    An epoch is ``repeats`` passes over the clips, each in an order of its own that comes from the seed and the pass
    alone; the last, incomplete global batch is dropped. The k-th global batch holds the same clips on any number of
    ranks. Each rank takes a contiguous share of it, in ``splits`` lists one after the other; shares and lists differ by
    a clip where numbers do not divide, so that a run can go on with as many ranks as are left.

    The epoch travels in the index, because persistent workers keep the data set that they started with. With repeats it
    counts passes, epoch * repeats + pass, so that each visit of a clip has a crop and a mask of its own.

    Args:
        num_clips: Clips in the manifest.
        batch_size: Clips in a global batch, over all ranks.
        seed: Seed of the run.
        repeats: Visits of each clip an epoch.
        rank: This process among the ranks.
        world_size: Number of ranks.
        splits: Lists that a rank's share of a global batch is split into.
        weights: (num_clips,), positive. An epoch is then ``epoch_clips`` different clips, each drawn with a chance that
            grows with its weight: one after the other, proportionally to the weights of those that are left.
        epoch_clips: How many.

    Raises:
        ValueError: For numbers that are not positive, a rank outside the world, a batch of which a rank or a list would
            get no clip, one that is larger than an epoch, or more clips to draw than there are.
    """

    def __init__(
        self,
        num_clips: int,
        batch_size: int,
        seed: int = 0,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
        splits: int = 1,
        weights: np.ndarray | None = None,
        epoch_clips: int | None = None,
    ):
        if weights is not None and weights.shape != (num_clips,):
            raise ValueError(f"weights must have shape ({num_clips},), one for each clip, got {weights.shape}")
        if weights is not None and not (weights > 0).all():
            raise ValueError(f"weights must be positive, got {weights.min()}")
        if (weights is None) != (epoch_clips is None):
            raise ValueError("weights and epoch_clips must be given together")
        if epoch_clips is not None and epoch_clips > num_clips:
            raise ValueError(f"an epoch of {epoch_clips} different clips, but the manifest has {num_clips}")
        self.clips_per_pass = num_clips if epoch_clips is None else epoch_clips
        counts = {
            "num_clips": num_clips,
            "batch_size": batch_size,
            "repeats": repeats,
            "world_size": world_size,
            "splits": splits,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1} in a world of {world_size}, got {rank}")
        if batch_size < world_size * splits:
            raise ValueError(
                f"a batch of {batch_size} clips, expected at least {world_size * splits}: "
                f"one for each of {splits} parts on each of {world_size} ranks"
            )
        if batch_size > self.clips_per_pass * repeats:
            raise ValueError(
                f"batch of {batch_size} clips, but {'the manifest' if weights is None else 'an epoch'} has "
                f"{self.clips_per_pass}"
                f"{f' ({self.clips_per_pass * repeats} with repeats={repeats})' if repeats > 1 else ''}: "
                "take a smaller batch or more repeats"
            )
        self.num_clips = num_clips
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self.rank = rank
        self.world_size = world_size
        self.splits = splits
        self.weights = weights
        self.epoch = self.first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Set what the next iteration draws.

        Args:
            epoch: Number of the epoch, from 0.
            first_step: Number of its global batches that are left out at its beginning: a resumed run has seen them.

        Raises:
            ValueError: No such epoch, or more batches than it has.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        if not 0 <= first_step <= self.steps:
            raise ValueError(f"first_step must be from 0 to the {self.steps} of an epoch, got {first_step}")
        self.epoch, self.first_step = epoch, first_step

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return self.clips_per_pass * self.repeats // self.batch_size

    @property
    def largest_part(self) -> int:
        """Clips of the longest list, on any rank."""
        share = -(-self.batch_size // self.world_size)
        return -(-share // self.splits)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.splits

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        passes = range(self.epoch * self.repeats, (self.epoch + 1) * self.repeats)
        order = np.concatenate([self._order(number) for number in passes])
        share = _part(range(self.batch_size), self.rank, self.world_size)
        for batch in range(self.first_step, self.steps):
            clips = range(batch * self.batch_size, (batch + 1) * self.batch_size)[share.start : share.stop]
            for split in range(self.splits):
                yield [(passes[i // self.clips_per_pass], int(order[i])) for i in _part(clips, split, self.splits)]

    def _order(self, number: int) -> np.ndarray:
        """The clips of a pass, shuffled."""
        draw = epoch_generator(self.seed, number, "order")
        if self.weights is None:
            return draw.permutation(self.num_clips)
        # Waiting times with the weights as rates: the order of the first arrivals is that of drawing one after the
        # other without replacement (Efraimidis & Spirakis 2006). It puts large weights first, hence the shuffle.
        arrivals = draw.exponential(size=self.num_clips) / self.weights
        chosen = np.argpartition(arrivals, self.clips_per_pass - 1)[: self.clips_per_pass]
        return draw.permutation(np.sort(chosen))


def _part(whole: range, number: int, count: int) -> range:
    """One of ``count`` parts of a range, one after the other, whose lengths differ by at most 1."""
    return whole[number * len(whole) // count : (number + 1) * len(whole) // count]


class EvaluationBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler: one rank's share of all clips, each clip once over all ranks, as lists of (0, clip) pairs.

    Args:
        num_clips: Clips in the manifest.
        batch_size: Clips of a list at most.
        rank: This process among the ranks.
        world_size: Number of ranks. Their shares differ by a clip where it does not divide ``num_clips``.
    """

    def __init__(self, num_clips: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.clips = range(rank, num_clips, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.clips) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for begin in range(0, len(self.clips), self.batch_size):
            yield [(0, clip) for clip in self.clips[begin : begin + self.batch_size]]

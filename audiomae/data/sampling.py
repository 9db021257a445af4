"""Which clips a batch holds."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from audiomae.seeding import epoch_generator


class ClipBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler: one rank's share of the shuffled global batches of an epoch, as lists of (epoch, clip) pairs.

    An epoch is ``repeats`` passes over the clips, each in an order of its own that comes from the seed and the pass
    alone; the last, incomplete global batch is dropped. The k-th global batch holds the same clips on any number of
    ranks, and each rank takes a contiguous share of it, in ``splits`` equal lists one after the other.

    The epoch travels in the index, because persistent workers keep the data set that they started with. With repeats it
    counts passes, epoch * repeats + pass, so that each visit of a clip has a crop and a mask of its own.

    Args:
        num_clips: Clips in the manifest.
        batch_size: Clips in a global batch, over all ranks.
        seed: Seed of the run.
        repeats: Visits of each clip an epoch.
        rank: This process among the ranks.
        world_size: Number of ranks; must divide ``batch_size``.
        splits: Lists that a rank's share of a global batch is split into; must divide the share.

    Raises:
        ValueError: For numbers that are not positive, a rank outside the world, a batch that the ranks cannot share
            equally, or one that is larger than an epoch.
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
    ):
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
        if batch_size % world_size != 0:
            raise ValueError(f"a batch of {batch_size} clips cannot be shared equally by {world_size} ranks")
        if batch_size // world_size % splits != 0:
            raise ValueError(
                f"a rank's {batch_size // world_size} clips of a batch cannot be split into {splits} equal parts"
            )
        if batch_size > num_clips * repeats:
            raise ValueError(
                f"batch of {batch_size} clips, but the manifest has {num_clips}"
                f"{f' ({num_clips * repeats} with repeats={repeats})' if repeats > 1 else ''}: "
                "take a smaller batch or more repeats"
            )
        self.num_clips = num_clips
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self.rank = rank
        self.world_size = world_size
        self.splits = splits
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration draws; counts from 0."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return self.num_clips * self.repeats // self.batch_size

    def __len__(self) -> int:
        return self.steps * self.splits

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        passes = range(self.epoch * self.repeats, (self.epoch + 1) * self.repeats)
        order = np.concatenate([epoch_generator(self.seed, p, "order").permutation(self.num_clips) for p in passes])
        share = self.batch_size // self.world_size
        size = share // self.splits
        for batch in range(self.steps):
            start = batch * self.batch_size + self.rank * share
            for begin in range(start, start + share, size):
                yield [(passes[i // self.num_clips], int(order[i])) for i in range(begin, begin + size)]

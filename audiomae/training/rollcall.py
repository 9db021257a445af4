"""Which ranks of a run go on, and whom the others wait for, from what each rank tells of itself."""

from typing import NamedTuple

COMPUTING = "computing"
WAITING_FOR_DEVICE = "waiting for the device"
WAITING_FOR_RANKS = "waiting for the other ranks"
# A rank that says one of these may wait for another one, in a collective; one that says anything else does not.
MAY_WAIT_FOR_RANKS = frozenset((COMPUTING, WAITING_FOR_DEVICE, WAITING_FOR_RANKS))

SILENT_BEATS = 4
"""Beats that are missing of a rank that is dead, where something else speaks for that too."""
NAMED = 8
"""Ranks that a line names at most."""


class Beat(NamedTuple):
    """What a rank tells of itself.

    Attributes:
        number: Counts its beats, from 1.
        host: Its machine.
        process: Its process there.
        step: The step that it is in.
        doing: What it does.
        still: Seconds since it said so.
        left: None while it takes part; why it left, empty if nothing was wrong with it.
    """

    number: int
    host: str
    process: int
    step: int
    doing: str
    still: float
    left: str | None


class RollCall:
    """What is known of all ranks, from readings of their last beats.

    Time is counted in readings, so that it stands still while this process is stopped or the store does not answer.

    Args:
        rank: This process.
        world_size: How many there are.
        interval: Seconds between readings.

    Attributes:
        beats: Last beat of each rank that was ever seen.
    """

    def __init__(self, rank: int, world_size: int, interval: float):
        self.beats: dict[int, Beat] = {}
        self._rank, self._world_size, self._interval = rank, world_size, interval
        self._readings = 0
        self._news: dict[int, int] = {}  # the reading that found the last beat

    def read(self, beats: dict[int, Beat]) -> None:
        """Take note of the last beats of ranks, as the store has them now."""
        self._readings += 1
        for rank, beat in beats.items():
            if beat != self.beats.get(rank):
                # In this order, since another thread may ask at any time.
                self._news[rank] = self._readings
                self.beats[rank] = beat

    def silence(self, rank: int) -> float:
        """Seconds since the last beat of a rank, or since the first reading."""
        return (self._readings - self._news.get(rank, 0)) * self._interval

    def gone(self, silence: float = 0.0) -> list[int]:
        """Other ranks that were seen, and left since something was wrong with them, or died.

        Args:
            silence: Seconds without a beat after which a rank is dead; at least a few beats.
        """
        silence = max(silence, SILENT_BEATS * self._interval)
        return [
            rank
            for rank, beat in sorted(self.beats.items())
            if rank != self._rank and (beat.left or (beat.left is None and self.silence(rank) >= silence))
        ]

    def stillness(self) -> float:
        """Seconds since the last mark of any rank that takes part."""
        beats = [self.beats.get(rank) for rank in range(self._world_size)]
        return min(
            (
                self.silence(rank) + (beat.still if beat else 0.0)
                for rank, beat in enumerate(beats)
                if beat is None or beat.left is None
            ),
            default=0.0,
        )

    def suspects(self) -> list[int]:
        """Ranks that the others may wait for, when all stand still."""
        absent = [rank for rank in range(self._world_size) if rank not in self.beats]
        if gone := sorted(absent + self.gone()):
            return gone
        here = {rank: beat for rank, beat in sorted(self.beats.items()) if beat.left is None}
        first = min(beat.step for beat in here.values())
        behind = [rank for rank, beat in here.items() if beat.step == first]
        return [rank for rank in behind if here[rank].doing not in MAY_WAIT_FOR_RANKS] or behind

    def describe(self, rank: int) -> str:
        """Tell who and where a rank is."""
        if rank not in self.beats:
            return f"rank {rank}: no sign of life since the run began"
        beat, silence = self.beats[rank], self.silence(rank)
        who = f"rank {rank} (host {beat.host}, process {beat.process})"
        if beat.left:
            return f"{who}: ended at step {beat.step}, {beat.doing}: {beat.left}"
        if silence >= SILENT_BEATS * self._interval:
            return f"{who}: no sign of life for {silence:.0f} s, last seen at step {beat.step}, {beat.doing}"
        return f"{who}: {beat.doing} at step {beat.step} for {silence + beat.still:.0f} s"

    def name(self, ranks: list[int]) -> str:
        """Describe ranks in a line, the first few of many."""
        more = [f"and {len(ranks) - NAMED} more"] if len(ranks) > NAMED else []
        return "; ".join([*map(self.describe, ranks[:NAMED]), *more])

"""What is told of ranks from their beats."""

import math

import pytest

from audiomae.training.rollcall import COMPUTING, WAITING_FOR_DEVICE, WAITING_FOR_RANKS, Beat, RollCall


def beat(number: int, step: int, doing: str, still: float = 0.0, left: str | None = None, rank: int = 0) -> Beat:
    return Beat(number, "h", 100 + rank, step, doing, still, left)


def roll_of(*beats: Beat, readings: int = 1, world_size: int | None = None) -> RollCall:
    roll = RollCall(0, world_size or len(beats), 0.5)
    for _ in range(readings):
        roll.read(dict(enumerate(beats)))
    return roll


@pytest.mark.parametrize(
    ("beats", "suspects"),
    [
        # A rank that is behind keeps the others waiting, whatever it does.
        ([(7, COMPUTING), (6, COMPUTING), (7, "waiting for data")], [1]),
        # Of those in the same step, the one that waits for no other does.
        ([(7, COMPUTING), (7, "waiting for data"), (7, WAITING_FOR_DEVICE)], [1]),
        ([(7, "saving"), (7, WAITING_FOR_RANKS), (7, WAITING_FOR_RANKS)], [0]),
        # A GPU is given work ahead of time.
        ([(9, "waiting for data"), (8, WAITING_FOR_DEVICE), (9, COMPUTING)], [1]),
        # It may be any of them.
        ([(7, COMPUTING), (7, COMPUTING), (7, COMPUTING)], [0, 1, 2]),
        ([(7, "evaluating"), (7, "evaluating"), (7, WAITING_FOR_RANKS)], [0, 1]),
    ],
)
def test_suspects(beats, suspects):
    assert roll_of(*(beat(1, *facts) for facts in beats)).suspects() == suspects


def test_ranks_that_never_came_or_fell_silent_come_first():
    roll = roll_of(beat(1, 7, "waiting for data"), beat(1, 9, COMPUTING), world_size=3)
    assert roll.suspects() == [2]
    assert roll.describe(2) == "rank 2: no sign of life since the run began"
    for number in range(2, 6):
        roll.read({0: beat(number, 7, "waiting for data"), 1: beat(1, 9, COMPUTING), 2: beat(number, 9, COMPUTING)})
    assert roll.suspects() == [1]
    assert roll.describe(1) == "rank 1 (host h, process 100): no sign of life for 2 s, last seen at step 9, computing"


def test_a_rank_is_dead_when_its_beats_stop_and_this_process_read_on():
    others = [beat(1, 7, COMPUTING), beat(1, 7, COMPUTING)]
    assert roll_of(*others, readings=4).gone() == []
    assert roll_of(*others, readings=5).gone() == [1]  # of its own beats, none is ever missed for long
    assert roll_of(*others, readings=5).gone(silence=2.5) == []
    assert roll_of(*others, readings=6).gone(silence=2.5) == [1]


def test_a_rank_that_left_in_order_is_missed_by_none():
    left = beat(9, 7, "saving", left="")
    roll = roll_of(beat(1, 7, WAITING_FOR_RANKS, still=3.0), left, readings=20)
    assert roll.gone() == []
    assert roll.suspects() == [0]
    assert roll.stillness() == 3.0 + 19 * 0.5


def test_a_rank_that_left_with_an_error_is_to_blame_at_once():
    roll = roll_of(beat(1, 7, COMPUTING), beat(9, 6, "saving", left="OSError: no space left", rank=1))
    assert roll.gone(silence=math.inf) == [1]
    assert roll.describe(1) == "rank 1 (host h, process 101): ended at step 6, saving: OSError: no space left"


def test_a_run_stands_as_still_as_the_last_rank_that_moved():
    assert roll_of(beat(1, 7, COMPUTING, still=9.0), beat(1, 7, COMPUTING, still=2.0)).stillness() == 2.0
    assert roll_of(beat(1, 7, COMPUTING, still=9.0), world_size=2, readings=4).stillness() == 4 * 0.5


def test_many_ranks_are_named_in_part():
    roll = roll_of(*(beat(1, 7, COMPUTING, still=9.0, rank=rank) for rank in range(12)))
    line = roll.name(roll.suspects())
    assert line.startswith("rank 0 (host h, process 100): computing at step 7 for 9 s; rank 1 (host h, ")
    assert line.endswith("rank 7 (host h, process 107): computing at step 7 for 9 s; and 4 more")

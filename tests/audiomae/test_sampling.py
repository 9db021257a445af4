from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomae.data import ClipBatches
from audiomae.data.sampling import EvaluationBatches
from audiomae.seeding import clip_generator, clip_seed, epoch_generator, visit_seeds


def batches_of(epoch: int = 0, **kwargs) -> list[list[tuple[int, int]]]:
    batches = ClipBatches(**kwargs)
    batches.set_epoch(epoch)
    drawn = list(batches)
    assert len(drawn) == len(batches)
    return drawn


@settings(deadline=None)
@given(st.data())
def test_each_epoch_visits_each_clip_and_any_world_shares_its_batches(data):
    world_size = data.draw(st.integers(1, 6))
    splits = data.draw(st.integers(1, 3))
    repeats = data.draw(st.integers(1, 4))
    batch_size = data.draw(st.integers(world_size * splits, 30))
    num_clips = data.draw(st.integers(-(-batch_size // repeats), 60))
    epoch = data.draw(st.integers(0, 5))
    common = {
        "num_clips": num_clips,
        "batch_size": batch_size,
        "repeats": repeats,
        "seed": data.draw(st.integers(0, 2**63 - 1)),
    }

    drawn = batches_of(epoch, **common)
    pairs = [pair for batch in drawn for pair in batch]
    assert {len(batch) for batch in drawn} == {batch_size}
    assert 0 <= num_clips * repeats - len(pairs) < batch_size
    assert len(set(pairs)) == len(pairs)
    assert {clip for _, clip in pairs} <= set(range(num_clips))
    assert {visit for visit, _ in pairs} <= set(range(epoch * repeats, (epoch + 1) * repeats))
    assert max(Counter(clip for _, clip in pairs).values()) <= repeats

    shares = {"world_size": world_size, "splits": splits}
    ranks = [batches_of(epoch, **common, **shares, rank=rank) for rank in range(world_size)]
    for step, batch in enumerate(drawn):
        parts = [rank[step * splits + split] for rank in ranks for split in range(splits)]
        assert [pair for part in parts for pair in part] == batch
        lengths = [sum(map(len, parts[rank * splits : (rank + 1) * splits])) for rank in range(world_size)]
        assert max(lengths) - min(lengths) <= 1
        assert min(map(len, parts)) >= 1


def test_an_epoch_goes_on_where_it_stopped():
    common = {"num_clips": 50, "batch_size": 7, "repeats": 2, "rank": 1, "world_size": 3, "splits": 2}
    whole = batches_of(4, **common)
    batches = ClipBatches(**common)
    for step in range(batches.steps + 1):
        batches.set_epoch(4, step)
        assert list(batches) == whole[2 * step :]
        assert len(batches) == len(whole) - 2 * step
    with pytest.raises(ValueError, match="first_step must be from 0 to the 14 of an epoch, got 15"):
        batches.set_epoch(4, 15)


def test_nothing_is_dropped_where_batches_fit():
    assert sorted(pair for batch in batches_of(2, num_clips=12, batch_size=4) for pair in batch) == [
        (2, clip) for clip in range(12)
    ]


def test_the_order_depends_on_seed_and_epoch_alone():
    common = {"num_clips": 100, "batch_size": 10}
    clips = [
        [clip for batch in batches_of(epoch, seed=seed, **common) for _, clip in batch]
        for seed, epoch in product(range(3), range(3))
    ]
    assert len({tuple(order) for order in clips}) == 9
    assert tuple(range(100)) not in {tuple(order) for order in clips}
    assert batches_of(1, seed=2, **common) == batches_of(1, seed=2, **common)


def test_repeats_are_further_epochs():
    repeated = batches_of(1, num_clips=12, batch_size=4, repeats=3)
    assert repeated == [batch for epoch in (3, 4, 5) for batch in batches_of(epoch, num_clips=12, batch_size=4)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"batch_size": 512}, "batch of 512 clips, but the manifest has 126: take a smaller batch or more repeats"),
        ({"batch_size": 512, "repeats": 4}, r"the manifest has 126 \(504 with repeats=4\)"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_clips": 0}, "num_clips must be at least 1, got 0"),
        ({"repeats": -1}, "repeats must be at least 1, got -1"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"world_size": 9}, "a batch of 8 clips, expected at least 9: one for each of 1 parts on each of 9 ranks"),
        ({"world_size": 3, "splits": 3}, "expected at least 9: one for each of 3 parts on each of 3 ranks"),
        ({"world_size": 2, "rank": 2}, "rank must be from 0 to 1 in a world of 2, got 2"),
        ({"rank": -1}, "rank must be from 0 to 0"),
    ],
)
def test_bad_arguments(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        ClipBatches(**{"num_clips": 126, "batch_size": 8, **arguments})


def test_bad_epoch():
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        ClipBatches(num_clips=8, batch_size=8).set_epoch(-1)


def test_clip_seeds_stay_the_same():
    # Written down once: a run must resume with the same draws under any later version.
    assert clip_seed(0, 0, 0, "crop") == 3_823_125_270_640_776_261
    assert clip_seed(1, 2, 3, "mask") == 8_863_053_869_251_185_979


def test_clip_seeds_differ_and_fill_63_bits():
    values = (0, 1, 2, -1, 2**62)
    draws = list(product(values, values, values, ("crop", "gain", "mask")))
    seeds = {clip_seed(seed, epoch, clip, purpose) for seed, epoch, clip, purpose in draws}
    assert len(seeds) == len(draws)
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 4 * 0.5 / len(seeds) ** 0.5


def test_generators_are_independent():
    draws = {
        tuple(generator.integers(2**32, size=4))
        for generator in (
            clip_generator(0, 0, 0, "crop"),
            clip_generator(0, 0, 0, "gain"),
            clip_generator(0, 1, 0, "crop"),
            epoch_generator(0, 0, "crop"),
            epoch_generator(0, 0, "order"),
        )
    }
    assert len(draws) == 5


def test_visit_seeds():
    pairs = torch.tensor([[0, 1], [1, 0], [7, 2**40]])
    seeds = visit_seeds(3, pairs, "mask")
    assert seeds.dtype == torch.int64
    assert seeds.tolist() == [clip_seed(3, epoch, clip, "mask") for epoch, clip in pairs.tolist()]
    assert visit_seeds(3, pairs[:0], "mask").shape == (0,)


@pytest.mark.parametrize("pairs", [torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3).long(), torch.zeros(4, 2)])
def test_visit_seeds_of_no_pairs(pairs):
    with pytest.raises(ValueError, match=r"pairs must be int64 of shape \(B, 2\)"):
        visit_seeds(0, pairs, "mask")


@pytest.mark.parametrize("number", [2**63, 0.5])
def test_seeds_of_no_integer(number):
    with pytest.raises(ValueError, match="must be integers of 64 bits"):
        clip_seed(number, 0, 0, "crop")


WEIGHTS = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 0.5, 0.5])


def weighted(**settings) -> ClipBatches:
    return ClipBatches(7, 3, seed=1, weights=WEIGHTS, epoch_clips=3, **settings)


def drawn(batches: ClipBatches, epoch: int) -> list[int]:
    batches.set_epoch(epoch)
    return [clip for batch in batches for _, clip in batch]


def test_weighted_epochs_hold_different_clips_in_proportion():
    batches = weighted()
    counts = np.zeros(7)
    first = np.zeros(7)
    for epoch in range(4000):
        clips = drawn(batches, epoch)
        assert len(set(clips)) == 3
        counts[clips] += 1
        first[clips[0]] += 1
    # The chance of a clip by drawing three one after the other, each in proportion to what is left.
    expected = np.zeros(7)
    for order in permutations(range(7), 3):
        chance, left = 1.0, WEIGHTS.sum()
        for clip in order:
            chance *= WEIGHTS[clip] / left
            left -= WEIGHTS[clip]
        expected[list(order)] += chance
    np.testing.assert_allclose(counts / 4000, expected, atol=0.025)
    # The heaviest clip comes no earlier within an epoch than others: it is in almost all, and first in a third of them.
    np.testing.assert_allclose(first / counts, np.full(7, 1 / 3), atol=0.1)


def test_weighted_epochs_are_the_same_on_any_number_of_ranks():
    for epoch in (0, 5):
        whole = drawn(weighted(), epoch)
        shares = [drawn(weighted(rank=rank, world_size=3), epoch) for rank in range(3)]
        assert [clip for share in shares for clip in share] == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": WEIGHTS[:3]}, r"weights must have shape \(7,\), one for each clip, got \(3,\)"),
        ({"weights": -WEIGHTS}, "weights must be positive, got -16.0"),
        ({"epoch_clips": 8}, "an epoch of 8 different clips, but the manifest has 7"),
        ({"epoch_clips": None}, "weights and epoch_clips must be given together"),
        ({"epoch_clips": 2}, "batch of 3 clips, but an epoch has 2: take a smaller batch or more repeats"),
    ],
)
def test_wrong_weights_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipBatches(7, 3, **{"weights": WEIGHTS, "epoch_clips": 3, **settings})


@pytest.mark.parametrize(("clips", "world_size", "batch_size"), [(7, 1, 3), (7, 3, 2), (2, 3, 5), (8, 2, 4)])
def test_evaluation_visits_every_clip_once(clips, world_size, batch_size):
    ranks = [EvaluationBatches(clips, batch_size, rank, world_size) for rank in range(world_size)]
    assert [len(batches) for batches in ranks] == [len(list(batches)) for batches in ranks]
    lists = [batch for batches in ranks for batch in batches]
    assert max(map(len, lists)) <= batch_size
    assert sorted(pair for batch in lists for pair in batch) == [(0, clip) for clip in range(clips)]

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from audiomae import PatchGrid, PatchMask
from tests.kernels.tolerance import assert_binomial

PAPER = PatchGrid()
OVERLAP = PatchGrid(patch_stride=(10, 10))
STRATEGIES = {
    "random": lambda seeds, grid: PatchMask.random(seeds, grid, 0.8),
    "time": lambda seeds, grid: PatchMask.time(seeds, grid, 0.5),
    "frequency": lambda seeds, grid: PatchMask.frequency(seeds, grid, 0.5),
    "time_frequency": lambda seeds, grid: PatchMask.time_frequency(seeds, grid, 0.3, 0.3),
}


def grid_of(times: int, frequencies: int) -> PatchGrid:
    return PatchGrid((times, frequencies), (1, 1), (1, 1))


def assert_consistent(mask: PatchMask, clips: int, length: int, kept: int) -> None:
    """The four tensors tell one story."""
    assert [tuple(t.shape) for t in mask] == [(clips, kept), (clips, length - kept), (clips, length), (clips, length)]
    assert [t.dtype for t in mask] == [torch.int64] * 3 + [torch.bool]
    ids_shuffle = torch.cat([mask.ids_keep, mask.ids_removed], dim=1)
    assert ids_shuffle.gather(1, mask.ids_restore).tolist() == [list(range(length))] * clips
    assert not mask.mask.gather(1, mask.ids_keep).any()
    assert mask.mask.gather(1, mask.ids_removed).all()


def official_count(total: int, ratio: float) -> int:
    return int(total * (1 - ratio))


@pytest.mark.parametrize(
    ("total", "ratio", "kept"),
    [
        (512, 0.8, 102),
        (512, 0.75, 128),
        (64, 0.3, 44),
        (8, 0.3, 5),
        (1212, 0.8, 242),
        (100, 0.9, 9),  # 100 * (1 - 0.9) is 9.999999999999998
        (10, 0.7, 3),  # 10 * (1 - 0.7) is 3.0000000000000004
    ],
)
def test_counts_follow_the_official_rule(total, ratio, kept):
    assert PatchMask.random(torch.arange(3), grid_of(total, 1), ratio).ids_keep.shape == (3, kept)
    assert PatchMask.time(torch.arange(3), grid_of(total, 1), ratio).ids_keep.shape == (3, kept)
    assert PatchMask.frequency(torch.arange(3), grid_of(1, total), ratio).ids_keep.shape == (3, kept)
    assert PatchMask.from_noise(torch.rand(3, total), ratio).ids_keep.shape == (3, kept)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_strategy_on_any_grid(data):
    times, frequencies = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    grid = grid_of(times, frequencies)
    seeds = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)), dtype=torch.int64)
    time_ratio, frequency_ratio = data.draw(st.floats(0.01, 0.99)), data.draw(st.floats(0.01, 0.99))
    kept_times, kept_frequencies = official_count(times, time_ratio), official_count(frequencies, frequency_ratio)
    assume(0 < kept_times < times)
    assume(0 < kept_frequencies < frequencies)

    kept = official_count(grid.num_patches, time_ratio)
    assert_consistent(PatchMask.random(seeds, grid, time_ratio), len(seeds), grid.num_patches, kept)

    for mask, rows, columns in [
        (PatchMask.time(seeds, grid, time_ratio), kept_times, frequencies),
        (PatchMask.frequency(seeds, grid, frequency_ratio), times, kept_frequencies),
        (PatchMask.time_frequency(seeds, grid, time_ratio, frequency_ratio), kept_times, kept_frequencies),
    ]:
        assert_consistent(mask, len(seeds), grid.num_patches, rows * columns)
        visible = ~mask.mask.unflatten(1, grid.shape)
        whole = visible.any(dim=2, keepdim=True) & visible.any(dim=1, keepdim=True)
        assert torch.equal(visible, whole), "whole time steps and frequencies stay or go"
        assert visible.any(dim=2).sum(dim=1).tolist() == [rows] * len(seeds)
        assert visible.any(dim=1).sum(dim=1).tolist() == [columns] * len(seeds)
        for ids in (mask.ids_keep, mask.ids_removed):
            assert torch.equal(ids, ids.sort(dim=1).values)


def test_the_papers_fine_tuning_keeps_44_times_of_5_frequencies():
    mask = PatchMask.time_frequency(torch.arange(4), PAPER, 0.3, 0.3)
    assert_consistent(mask, 4, 512, 44 * 5)
    for ids in mask.ids_keep:
        assert len(ids.div(8, rounding_mode="floor").unique()) == 44
        assert len((ids % 8).unique()) == 5


def test_no_removed_patch_is_among_the_kept_of_a_grid_of_more_than_999():
    """Where the released code, which codes a patch as a number below 1000, lets removed patches through."""
    assert OVERLAP.num_patches == 1212
    seeds = torch.arange(50)
    mask = PatchMask.time_frequency(seeds, OVERLAP, 0.3, 0.3)
    assert_consistent(mask, 50, 1212, 70 * 8)
    for clip in range(50):
        assert not set(mask.ids_keep[clip].tolist()) & set(mask.ids_removed[clip].tolist())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [PAPER, OVERLAP], ids=["paper", "overlap"])
def test_a_row_depends_on_its_seed_alone(strategy, grid):
    seeds = torch.tensor([7, -3, 2**62, 7, 0])
    whole = STRATEGIES[strategy](seeds, grid)
    for row, seed in enumerate(seeds):
        for alone, many in zip(STRATEGIES[strategy](seed[None], grid), whole, strict=True):
            assert torch.equal(alone[0], many[row])
    assert torch.equal(whole.mask[0], whole.mask[3])
    assert not torch.equal(whole.mask[0], whole.mask[1])


def test_times_and_frequencies_are_removed_evenly_and_independently():
    rows, grid = 20_000, grid_of(8, 5)
    removed = PatchMask.time_frequency(torch.arange(rows), grid, 0.5, 0.4).mask.unflatten(1, grid.shape)
    times, frequencies = removed.all(dim=2).double(), removed.all(dim=1).double()
    assert_binomial(times.sum(dim=0), rows, 4 / 8)
    assert_binomial(frequencies.sum(dim=0), rows, 2 / 5)
    assert_binomial(times.T @ frequencies, rows, 4 / 8 * 2 / 5)


def test_the_strategies_remove_evenly():
    rows, grid = 20_000, grid_of(5, 4)
    # Random keeps 3 of 20, not 4: 20 * (1 - 0.8) is 3.999999999999999.
    kept = {"random": 3, "time": 2 * 4, "frequency": 5 * 2, "time_frequency": 3 * 2}
    for strategy, number in kept.items():
        share = 1 - number / grid.num_patches
        assert_binomial(STRATEGIES[strategy](torch.arange(rows), grid).mask.sum(dim=0), rows, share)


@pytest.mark.parametrize("ratio", [0.2, 0.75, 0.8])
def test_from_noise_is_the_double_argsort_of_published_code(ratio):
    noise = np.random.default_rng(0).random((5, 97))
    mask = PatchMask.from_noise(torch.from_numpy(noise), ratio)
    order = noise.argsort(axis=1)
    kept = official_count(97, ratio)
    assert mask.ids_keep.tolist() == order[:, :kept].tolist()
    assert mask.ids_removed.tolist() == order[:, kept:].tolist()
    assert mask.ids_restore.tolist() == order.argsort(axis=1).tolist()
    assert_consistent(mask, 5, 97, kept)


def test_to_moves_all_four_tensors():
    mask = PatchMask.random(torch.arange(2), PAPER, 0.8)
    moved = mask.to("meta")
    assert isinstance(moved, PatchMask)
    assert [t.device.type for t in moved] == ["meta"] * 4
    assert [t.shape for t in moved] == [t.shape for t in mask]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_a_ratio_that_is_no_share_is_refused(ratio):
    with pytest.raises(ValueError, match=f"^mask ratio is {ratio}, expected a number between 0 and 1$"):
        PatchMask.random(torch.arange(2), PAPER, ratio)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda seeds: PatchMask.random(seeds, PAPER, 0.0), "0.0 keeps 512 of 512"),
        (lambda seeds: PatchMask.random(seeds, PAPER, 1.0), "1.0 keeps 0 of 512"),
        (lambda seeds: PatchMask.time(seeds, grid_of(10, 4), 0.9), "0.9 keeps 0 of 10"),
        (lambda seeds: PatchMask.frequency(seeds, grid_of(10, 4), 0.8), "0.8 keeps 0 of 4"),
        (lambda seeds: PatchMask.time_frequency(seeds, PAPER, 0.3, 0.0), "0.0 keeps 8 of 8"),
        (lambda seeds: PatchMask.from_noise(torch.rand(2, 5), 1e-20), "1e-20 keeps 5 of 5"),
    ],
)
def test_a_ratio_that_keeps_or_removes_nothing_is_refused(draw, message):
    with pytest.raises(ValueError, match=f"^a mask ratio of {message}, expected one that keeps and removes some$"):
        draw(torch.arange(2))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^noise has shape \(5,\), expected \(B, L\)$"):
        PatchMask.from_noise(torch.rand(5), 0.5)

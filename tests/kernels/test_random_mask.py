import math
import operator
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mae_kernels import random_mask
from mae_kernels.ops.random_mask import reference
from torch import Tensor

from .calls import CALLS, KERNEL_DEVICE
from .tolerance import SIGMAS, assert_binomial

FORMS = ["reference", "torch", "triton"]
SEEDS = [0, 1, 2024, -1, -(2**63), 2**63 - 1, 2**32, -(2**32)]

# Kept, then removed positions of 16, by seed. They are part of the operator's meaning: a run that is resumed or
# repeated under another version must see the same masks.
GOLDEN = {
    0: [15, 14, 9, 3, 5, 7, 0, 2, 1, 4, 11, 10, 13, 8, 12, 6],
    2024: [1, 14, 4, 8, 6, 13, 2, 10, 7, 15, 5, 11, 3, 9, 12, 0],
    -1: [10, 12, 7, 9, 3, 13, 8, 1, 11, 6, 14, 2, 4, 5, 15, 0],
}


def hash32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ x >> 15


def shuffle(seed: int, length: int) -> list[int]:
    """Positions by ascending noise, from the docstring's formula in whole numbers of any size."""
    low, high = seed % 2**32, (seed >> 32) % 2**32
    key1 = hash32(hash32(high ^ 0x9E3779B9) ^ low)
    key2 = hash32(hash32(low ^ 0x85EBCA6B) ^ high)
    return sorted(range(length), key=lambda position: hash32(hash32(position ^ key1) ^ key2))


def draw(seeds: Tensor, length: int, keep: int, impl: str) -> tuple[Tensor, ...]:
    """What a form gives where it runs, brought back."""
    device = KERNEL_DEVICE if impl == "triton" else "cpu"
    return tuple(result.cpu() for result in random_mask(seeds.to(device), length, keep, impl=impl))


def removed(seeds: Tensor, length: int, keep: int) -> Tensor:
    """``(B, length)`` float64, 1 where removed."""
    return random_mask(seeds, length, keep)[3].double()


@pytest.mark.parametrize("impl", FORMS)
def test_golden_rows(impl):
    ids_keep, ids_removed, *_ = draw(torch.tensor(list(GOLDEN)), 16, 5, impl)
    assert torch.cat([ids_keep, ids_removed], dim=1).tolist() == list(GOLDEN.values())


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(("length", "keep"), [(512, 102), (97, 13), (601, 120), (7, 7), (5, 0), (1, 1)])
def test_equals_the_formula_in_whole_numbers(length, keep, impl):
    order = [shuffle(seed, length) for seed in SEEDS]
    ids_keep, ids_removed, ids_restore, mask = draw(torch.tensor(SEEDS), length, keep, impl)
    assert ids_keep.tolist() == [row[:keep] for row in order]
    assert ids_removed.tolist() == [row[keep:] for row in order]
    assert ids_restore.tolist() == [[row.index(position) for position in range(length)] for row in order]
    assert mask.tolist() == [[position in row[keep:] for position in range(length)] for row in order]


@pytest.mark.parametrize("impl", FORMS)
@settings(deadline=None, max_examples=50)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    length=st.integers(0, 70),
    share=st.floats(0, 1),
)
def test_the_four_results_agree(impl, seeds, length, share):
    keep = round(share * length)
    seeds = torch.tensor(seeds, dtype=torch.int64)
    ids_keep, ids_removed, ids_restore, mask = draw(seeds, length, keep, impl)

    shapes = [tuple(t.shape) for t in (ids_keep, ids_removed, ids_restore, mask)]
    assert shapes == [(len(seeds), n) for n in (keep, length - keep, length, length)]
    assert [t.dtype for t in (ids_keep, ids_removed, ids_restore, mask)] == [torch.int64] * 3 + [torch.bool]
    assert all(t.is_contiguous() for t in (ids_keep, ids_removed, ids_restore, mask))
    places = torch.cat([ids_keep, ids_removed], dim=1).gather(1, ids_restore)
    assert places.tolist() == [list(range(length))] * len(seeds)
    assert not mask.gather(1, ids_keep).any()
    assert mask.gather(1, ids_removed).all()


@pytest.mark.parametrize("impl", FORMS)
def test_a_row_depends_on_its_seed_alone(impl):
    seeds = torch.tensor([*SEEDS, 5, 5])
    whole = draw(seeds, 64, 13, impl)
    shuffled = draw(seeds.flip(0), 64, 13, impl)
    for row, seed in enumerate(seeds):
        alone = draw(seed[None], 64, 13, impl)
        for one, many, flipped in zip(alone, whole, shuffled, strict=True):
            assert torch.equal(one[0], many[row])
            assert torch.equal(one[0], flipped[len(seeds) - 1 - row])


FUSED = ["torch", "triton"]


def assert_equals_the_reference(seeds: Tensor, length: int, keep: int, impl: str) -> None:
    for fused, published in zip(draw(seeds, length, keep, impl), reference(seeds, length, keep), strict=True):
        assert torch.equal(fused, published)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(
    ("length", "keep"), [(1, 0), (2, 1), (31, 31), (32, 31), (33, 0), (63, 12), (64, 1), (65, 64), (257, 51)]
)
def test_equals_the_reference_around_the_blocks(length, keep, batch, impl):
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=torch.Generator().manual_seed(length))
    assert_equals_the_reference(seeds, length, keep, impl)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(("length", "keep"), [(8191, 1638), (8192, 1638), (2053, 2053)])
def test_equals_the_reference_in_a_long_row(length, keep, impl, monkeypatch):
    if KERNEL_DEVICE == "cpu":  # the interpreter takes its time for a block, whatever its size
        monkeypatch.setattr("mae_kernels.kernels.random_mask._BLOCK", 1024)
        monkeypatch.setattr("mae_kernels.kernels.random_mask._BLOCK_OTHERS", 1024)
    assert_equals_the_reference(torch.tensor([2**40]), length, keep, impl)


@pytest.mark.parametrize("impl", FUSED)
@settings(deadline=None, max_examples=20)
@given(seeds=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3), length=st.integers(0, 200), share=st.floats(0, 1))
def test_equals_the_reference(impl, seeds, length, share):
    assert_equals_the_reference(torch.tensor(seeds, dtype=torch.int64), length, round(share * length), impl)


@pytest.mark.parametrize("impl", FUSED)
def test_strided_seeds_are_read_as_they_are(impl):
    assert_equals_the_reference(torch.tensor(SEEDS)[::2], 16, 5, impl)
    assert_equals_the_reference(torch.tensor([7]).expand(3), 16, 5, impl)


def test_keeping_more_keeps_what_was_kept():
    seeds = torch.arange(20)
    few, many = random_mask(seeds, 64, 10)[0], random_mask(seeds, 64, 30)[0]
    assert torch.equal(many[:, :10], few)


@pytest.mark.parametrize("first_seed", [0, -10_000, 2**40])
def test_every_position_takes_every_place_equally_often(first_seed):
    rows, length = 20_000, 16
    ids_restore = random_mask(torch.arange(first_seed, first_seed + rows), length, 5)[2]
    count = torch.stack([(ids_restore == place).sum(dim=0) for place in range(length)])
    assert_binomial(count, rows, 1 / length)


@pytest.mark.parametrize("keep", [1, 3, 8])
def test_pairs_are_removed_as_in_draws_without_replacement(keep):
    """Which is a correlation of -1 / (L - 1) between any two positions."""
    rows, length = 40_000, 16
    mask = removed(torch.arange(rows), length, keep)
    number = length - keep
    assert_binomial(mask.sum(dim=0), rows, number / length)
    first, second = torch.triu_indices(length, length, offset=1)
    both = (mask.T @ mask)[first, second]
    assert_binomial(both, rows, number * (number - 1) / (length * (length - 1)))
    correlation = torch.corrcoef(mask.T)[first, second]
    # The deviation of a correlation near zero is 1 / sqrt(rows).
    bound = SIGMAS / math.sqrt(rows)
    assert (correlation + 1 / (length - 1)).abs().max() < bound


RELATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "next": lambda seeds: seeds + 1,
    "negative": lambda seeds: -seeds - 1,
    "halves-swapped": lambda seeds: seeds << 32 | seeds >> 32 & 0xFFFFFFFF,
    **{f"bit-{bit}": partial(operator.xor, 1 << bit) for bit in (0, 1, 9, 31, 32, 62)},
    "sign": partial(operator.xor, -(2**63)),
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_seeds_that_are_related_draw_independent_rows(relation):
    rows, length, keep = 20_000, 16, 5
    seeds = 1024 * torch.arange(1, rows + 1)  # so that no seed is in two pairs
    first, second = removed(seeds, length, keep), removed(RELATIONS[relation](seeds), length, keep)
    assert_binomial(first.T @ second, rows, ((length - keep) / length) ** 2)


def test_a_batch_of_seeds_does_not_repeat_masks():
    ids_restore = random_mask(torch.arange(-5_000, 5_000), 64, 13)[2]
    assert len(ids_restore.unique(dim=0)) == 10_000


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seeds": torch.zeros(2, 1).long()}, ValueError, r"seeds has shape \(2, 1\), expected \(B\)"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds has dtype torch.float32, expected torch.int64"),
        ({"seeds": 3}, TypeError, r"seeds is a int, expected a tensor \(B\)"),
        ({"keep": -1}, ValueError, "keep is -1, expected 0 to length = 7"),
        ({"keep": 8}, ValueError, "keep is 8, expected 0 to length = 7"),
        ({"length": -1, "keep": 0}, ValueError, "keep is 0, expected 0 to length = -1"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=f"^random_mask: {message}$"):
        CALLS["random_mask"](**changes)

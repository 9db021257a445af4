import numpy as np
import pytest
import torch
from mae_kernels.positions import sincos_1d
from numpy.typing import NDArray

from audiomae.positions import fit_positions, sincos_2d

GRIDS = [(64, 8), (8, 64), (5, 3), (1, 7), (101, 12)]


def table_of(grid: tuple[int, int], dim: int, layout: str) -> NDArray[np.float64]:
    """``(1 + L, dim)``: the class token's zeros, then for each token sin and cos of its column, then of its row."""
    times, frequencies = grid
    columns = frequencies if layout == "true" else times
    table = np.zeros((1 + times * frequencies, dim))
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    for token in range(times * frequencies):
        row, column = divmod(token, columns)
        parts = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
        table[1 + token] = np.concatenate(parts)
    return table


@pytest.mark.parametrize("layout", ["true", "official"])
@pytest.mark.parametrize("dim", [4, 8, 192])
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_formula(grid, dim, layout):
    table = sincos_2d(grid, dim, layout=layout)
    assert table.shape == (1, 1 + grid[0] * grid[1], dim)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table[0].numpy(), table_of(grid, dim, layout), rtol=0, atol=1e-7)


def test_one_axis():
    positions = torch.tensor([0.0, 1.0, 2.5])
    omega = np.array([1, 0.1, 0.01, 0.001])
    angles = positions.numpy()[:, None] * omega
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(sincos_1d(positions, 8).numpy(), expected, rtol=0, atol=1e-12)


def test_tokens_of_the_true_layout_share_what_their_places_share():
    patches = sincos_2d((6, 4), 16)[0, 1:].unflatten(0, (6, 4))
    assert torch.equal(patches[:, :, :8], patches[:1, :, :8].expand(6, -1, -1)), "the first half is frequency"
    assert torch.equal(patches[:, :, 8:], patches[:, :1, 8:].expand(-1, 4, -1)), "the second half is time"
    assert len(patches.flatten(0, 1).unique(dim=0)) == 24


def test_the_layouts_agree_on_a_square_grid_alone():
    assert torch.equal(sincos_2d((8, 8), 16), sincos_2d((8, 8), 16, layout="official"))
    assert not torch.equal(sincos_2d((64, 8), 16), sincos_2d((64, 8), 16, layout="official"))


@pytest.mark.parametrize(
    ("dim", "layout", "message"),
    [
        (10, "true", "a 2-D sine-cosine embedding has 10 dimensions, expected a multiple of 4"),
        (8, "transposed", "position_grid is 'transposed', expected 'true' or 'official'"),
    ],
)
def test_wrong_arguments_are_refused(dim, layout, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        sincos_2d((4, 4), dim, layout=layout)


def loaded(grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, 1 + grid[0] * grid[1], 6, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_same_grid_is_left_alone():
    table = loaded((4, 3))
    fitted, note = fit_positions(table, (4, 3), (4, 3))
    assert fitted is table
    assert note == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_shorter_clip_takes_the_leading_time_steps_exactly(dtype):
    table = loaded((64, 8), dtype)
    fitted, note = fit_positions(table, (64, 8), (32, 8))
    assert torch.equal(fitted, table[:, : 1 + 32 * 8])
    assert note == "position embedding cropped to the first 32 of 64 time steps"


@pytest.mark.parametrize("target", [(9, 3), (4, 5), (3, 2), (4, 2), (3, 5), (8, 6)])
def test_any_other_grid_is_interpolated_and_says_so(target):
    table = loaded((4, 3), torch.bfloat16)
    fitted, note = fit_positions(table, (4, 3), target)
    assert fitted.shape == (1, 1 + target[0] * target[1], 6)
    assert fitted.dtype == torch.bfloat16
    assert torch.equal(fitted[:, 0], table[:, 0])
    assert note == f"position embedding interpolated from a grid of (4, 3) to {target}"


def cubic_weights(source: int, target: int) -> NDArray[np.float64]:
    """``(target, source)`` of cubic convolution with a = -0.75, centres of cells aligned, edges repeated."""
    a = -0.75
    weights = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - j)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, np.clip(j, 0, source - 1)] += near if d <= 1 else far
    return weights


@pytest.mark.parametrize("target", [(9, 3), (4, 5), (7, 11), (3, 2)])
def test_interpolation_is_bicubic_on_the_right_axes(target):
    source = (4, 3)
    table = loaded(source)
    fitted, _ = fit_positions(table, source, target)
    times, frequencies = (cubic_weights(*sizes) for sizes in zip(source, target, strict=True))
    expected = np.einsum("it,jf,tfd->ijd", times, frequencies, table[0, 1:].unflatten(0, source).numpy())
    np.testing.assert_allclose(fitted[0, 1:].unflatten(0, target).numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 12, 6), (1, 14, 6), (13, 6)])
def test_a_table_of_another_grid_is_refused(shape):
    with pytest.raises(ValueError, match=r"^position table has shape \(.*\), expected \(1, 13, D\)$"):
        fit_positions(torch.zeros(shape), (4, 3), (4, 3))

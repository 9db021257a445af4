import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mae_kernels.patches import gather_patches, grid_shape, patchify, unpatchify
from torch import Tensor

from .tolerance import assert_same_function

CASES = [
    # batch, channels, image, patch, stride
    (2, 1, (8, 8), (4, 4), (4, 4)),
    (1, 3, (6, 10), (3, 5), (3, 5)),
    (3, 2, (11, 7), (4, 3), (1, 2)),
    (2, 2, (7, 5), (7, 5), (2, 3)),
    (2, 3, (5, 4), (1, 1), (1, 1)),
    (0, 2, (6, 4), (2, 2), (2, 2)),
]


def cut(image: Tensor, patch_size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Patches value by value: row, column, channel, channel fastest; patches row-major."""
    batch, channels, height, width = image.shape
    rows, columns = range(0, height - patch_size[0] + 1, stride[0]), range(0, width - patch_size[1] + 1, stride[1])
    values = [
        image[:, c, row + p, column + q]
        for row in rows
        for column in columns
        for p in range(patch_size[0])
        for q in range(patch_size[1])
        for c in range(channels)
    ]
    return torch.stack(values, dim=1).reshape(batch, len(rows) * len(columns), patch_size[0] * patch_size[1] * channels)


@pytest.mark.parametrize(("batch", "channels", "size", "patch", "stride"), CASES)
def test_patchify_cuts_in_the_documented_order(batch, channels, size, patch, stride):
    image = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_same_function(
        lambda image: patchify(image, patch, stride), lambda image: cut(image, patch, stride), {"image": image}
    )
    assert (
        patchify(image, patch, stride).shape[1]
        == grid_shape(size, patch, stride)[0] * grid_shape(size, patch, stride)[1]
    )


@pytest.mark.parametrize(("batch", "channels", "size", "patch", "stride"), CASES)
def test_unpatchify_takes_the_mean_where_patches_overlap(batch, channels, size, patch, stride):
    rows, columns = grid_shape(size, patch, stride)
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(
        batch, rows * columns, patch[0] * patch[1] * channels, generator=generator, dtype=torch.float64
    )
    total, count = torch.zeros(batch, channels, *size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for token in range(rows * columns):
        row, column = (place * step for place, step in zip(divmod(token, columns), stride, strict=True))
        area = slice(row, row + patch[0]), slice(column, column + patch[1])
        total[:, :, *area] += patches[:, token].reshape(batch, *patch, channels).permute(0, 3, 1, 2)
        count[area] += 1
    expected = torch.where(count > 0, total / count, torch.zeros(()))
    torch.testing.assert_close(unpatchify(patches, size, patch, stride), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_round_trip_loses_only_the_margin_that_no_patch_covers(data):
    sizes = st.integers(1, 9)
    size = (data.draw(sizes), data.draw(sizes))
    patch = tuple(data.draw(st.integers(1, side)) for side in size)
    stride = tuple(data.draw(st.integers(1, side)) for side in patch)
    channels = data.draw(st.integers(1, 3))
    image = torch.randn(2, channels, *size, dtype=torch.float64)
    rows, columns = grid_shape(size, patch, stride)
    covered = torch.zeros_like(image)
    covered[:, :, : (rows - 1) * stride[0] + patch[0], : (columns - 1) * stride[1] + patch[1]] = 1
    torch.testing.assert_close(
        unpatchify(patchify(image, patch, stride), size, patch, stride), image * covered, rtol=1e-12, atol=1e-12
    )


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match=r"^an image of \(8, 3\) is smaller than one patch of \(4, 4\)$"):
        grid_shape((8, 3), (4, 4), (4, 4))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    ("size", "patch_size", "stride"),
    [
        ((16, 12), (4, 4), (4, 4)),
        ((17, 12), (4, 3), (4, 3)),  # a margin below that no patch covers
        ((16, 13), (4, 4), (4, 4)),  # and one on the right
        ((16, 12), (4, 4), (3, 2)),
    ],
)
def test_gathered_patches_are_those_of_patchify(size, patch_size, stride, contiguous):
    image = torch.randn(3, 2, *size)
    if not contiguous:
        image = image.transpose(2, 3).contiguous().transpose(2, 3)
    patches = patchify(image, patch_size, stride)
    ids = torch.rand(3, patches.shape[1]).argsort(dim=1)[:, :5]
    gathered = gather_patches(image, ids, patch_size, stride)
    assert gathered.shape == (3, 5, 2, *patch_size)
    expected = patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2]))
    torch.testing.assert_close(gathered.permute(0, 1, 3, 4, 2).flatten(2), expected, rtol=0, atol=0)

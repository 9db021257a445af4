import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomae import PatchGrid


@st.composite
def axes(draw) -> tuple[int, int, int]:
    """Sizes of a spectrogram, a patch and its stride along one axis, with a margin where patches overlap."""
    patch, count = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    stride = draw(st.integers(1, patch))
    margin = draw(st.integers(0, stride - 1)) if stride < patch else 0
    return (count - 1) * stride + patch + margin, patch, stride


grids = st.tuples(axes(), axes()).map(lambda sizes: PatchGrid(*zip(*sizes, strict=True)))


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (PatchGrid(), (64, 8)),
        (PatchGrid(patch_stride=(10, 10)), (101, 12)),
        (PatchGrid(patch_size=(32, 16)), (63, 8)),
        (PatchGrid(patch_size=(16, 32), patch_stride=(16, 32)), (64, 4)),
        (PatchGrid((512, 128)), (32, 8)),
        (PatchGrid((16, 16)), (1, 1)),
    ],
)
def test_counts_of_the_papers_grids(grid, shape):
    assert grid.shape == shape
    assert grid.num_patches == shape[0] * shape[1]


@settings(deadline=None, max_examples=50)
@given(grids)
def test_token_order_is_time_major_frequency_fastest(grid):
    spec = torch.randn(2, 3, *grid.spec_size)
    patches = grid.patchify(spec)
    times, frequencies = grid.shape
    assert patches.shape == (2, grid.num_patches, grid.patch_size[0] * grid.patch_size[1] * 3)
    for t in range(times):
        for f in range(frequencies):
            top, left = t * grid.patch_stride[0], f * grid.patch_stride[1]
            cut = spec[:, :, top : top + grid.patch_size[0], left : left + grid.patch_size[1]]
            assert torch.equal(patches[:, t * frequencies + f], cut.permute(0, 2, 3, 1).flatten(1))


@settings(deadline=None, max_examples=50)
@given(grids)
def test_unpatchify_undoes_patchify(grid):
    spec = torch.randn(2, 3, *grid.spec_size, dtype=torch.float64)
    covered = [
        (n - 1) * step + side for n, step, side in zip(grid.shape, grid.patch_stride, grid.patch_size, strict=True)
    ]
    restored = grid.unpatchify(grid.patchify(spec))
    torch.testing.assert_close(
        restored[:, :, : covered[0], : covered[1]], spec[:, :, : covered[0], : covered[1]], rtol=1e-12, atol=1e-12
    )
    assert not restored[:, :, covered[0] :].any()
    assert not restored[:, :, :, covered[1] :].any()


def test_patches_that_overlap_are_averaged():
    grid = PatchGrid((3, 2), (2, 2), (1, 2))
    patches = torch.tensor([[1.0] * 4, [5.0] * 4])[None]
    expected = torch.tensor([[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]])[None, None]
    torch.testing.assert_close(grid.unpatchify(patches), expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"spec_size": (0, 128)},
            "spec_size, patch_size, patch_stride are 0, 16, 16 frames, expected 1 up",
        ),
        (
            {"patch_stride": (16, 0)},
            "spec_size, patch_size, patch_stride are 128, 16, 0 mel bins, expected 1 up",
        ),
        ({"spec_size": (8, 128)}, "patch_size is 16 frames, expected at most the 8 of spec_size"),
        ({"patch_size": (16, 256)}, "patch_size is 256 mel bins, expected at most the 128 of spec_size"),
        ({"patch_stride": (16, 17)}, "patch_stride is 17 mel bins, expected at most the 16 of patch_size"),
        ({"spec_size": (1000, 128)}, "spec_size has 1000 frames, expected a multiple of the 16 of patch_size"),
        ({"spec_size": (1024, 120)}, "spec_size has 120 mel bins, expected a multiple of the 16 of patch_size"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        PatchGrid(**sizes)

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from audiomae import AudioMAE, AudioMAEConfig, LogMel, PatchGrid, PatchMask
from audiomae.frontend import mel_filters
from audiomae.training.pictures import (
    covered,
    figure_to_array,
    frequency_ticks,
    reconstruction_examples,
    reconstruction_figure,
    save_figure,
)

GRIDS = [
    PatchGrid((48, 32), (16, 16), (16, 16)),
    PatchGrid((50, 37), (16, 16), (10, 10)),  # overlapping, with a margin that no patch reaches
    PatchGrid((40, 24), (8, 12), (5, 7)),
]
GREY = 204  # 0.8 x 255


def random_case(grid: PatchGrid, clips: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original, reconstruction = torch.randn(2, clips, *grid.spec_size, generator=generator) * 4 - 5
    return original, reconstruction, torch.rand(clips, grid.num_patches, generator=generator) < 0.7


def panels(figure: Figure) -> np.ndarray:
    """The axes, a row a clip, without the colour bar."""
    return np.array([axis for axis in figure.axes if axis.get_label() != "<colorbar>"]).reshape(-1, 3)


def shown(figure: Figure) -> Tensor:
    """What the panels show, (clips, 3, frames, mel bins), NaN where they are grey."""
    arrays = [[np.ma.filled(axis.images[0].get_array(), np.nan).T for axis in row] for row in panels(figure)]
    return torch.from_numpy(np.array(arrays)).float()


def covered_slowly(patches: Tensor, grid: PatchGrid) -> Tensor:
    result = torch.zeros(len(patches), *grid.spec_size, dtype=torch.bool)
    for clip, token in patches.nonzero().tolist():
        time, mel = divmod(token, grid.shape[1])
        time, mel = time * grid.patch_stride[0], mel * grid.patch_stride[1]
        result[clip, time : time + grid.patch_size[0], mel : mel + grid.patch_size[1]] = True
    return result


@pytest.mark.parametrize("grid", GRIDS)
def test_panels_show_what_they_say(grid):
    original, reconstruction, mask = random_case(grid, clips=3, seed=1)
    figure = reconstruction_figure(original, reconstruction, mask, grid)
    visible = covered_slowly(~mask, grid)
    inside = covered_slowly(torch.ones_like(mask), grid)
    assert 0.05 < visible.float().mean() < 0.95
    torch.testing.assert_close(covered(~mask, grid), visible)
    expected = [original, original.where(visible, torch.nan), reconstruction.where(inside, torch.nan)]
    torch.testing.assert_close(shown(figure), torch.stack(expected, 1), rtol=0, atol=0, equal_nan=True)


def test_axes_have_units_and_one_scale():
    grid = GRIDS[1]
    case = random_case(grid, clips=2, seed=2)
    figure = reconstruction_figure(*case, grid, names=["a$b_c", "x" * 60], sample_rate=8000, hop_ms=20.0, low_hz=0.0)
    axes = panels(figure)
    assert [axis.get_title() for axis in axes[0]] == [
        "original",
        f"masked input ({1 - case[2].float().mean():.0%} of patches visible)",
        "reconstruction",
    ]
    assert axes[0, 0].get_ylabel() == "a$b_c"
    assert 20 <= len(axes[1, 0].get_ylabel()) <= 30
    assert len({axis.images[0].get_clim() for axis in axes.flat}) == 1
    low, high = axes[0, 0].images[0].get_clim()
    assert case[0].min() <= low < case[0].median() < high <= case[0].max()
    figure_to_array(figure)  # lays the ticks out
    for axis in axes.flat:
        assert axis.images[0].get_extent() == [0, 1.0, -0.5, 36.5]
        assert axis.get_xlim() == (0, 1.0)
    for axis in axes[-1]:
        assert axis.get_xlabel() == "time (s)"
    ticks = frequency_ticks(37, 0.0, 4000.0)
    assert [label.get_text() for label in axes[0, 0].get_yticklabels()] == list(ticks)
    assert list(axes[0, 0].get_yticks()) == list(ticks.values())
    assert "log mel energy" in [axis.get_ylabel() for axis in figure.axes]


@pytest.mark.parametrize(
    ("num_mels", "low_hz", "high_hz", "names"),
    [
        (128, 20.0, 8000.0, ["250 Hz", "500 Hz", "1 kHz", "2 kHz", "4 kHz"]),
        (64, 0.0, 22050.0, ["250 Hz", "500 Hz", "1 kHz", "2 kHz", "4 kHz", "8 kHz", "16 kHz"]),
        (40, 300.0, 3400.0, ["500 Hz", "1 kHz", "2 kHz"]),
    ],
)
def test_ticks_lie_at_the_centres_of_the_front_ends_filters(num_mels, low_hz, high_hz, names):
    fft_size, sample_rate = 1 << 15, 44100
    filters = mel_filters(num_mels, fft_size, sample_rate, low_hz, high_hz)
    centres = filters.argmax(0).numpy() * sample_rate / fft_size
    ticks = frequency_ticks(num_mels, low_hz, high_hz)
    assert list(ticks) == names
    for name, place in ticks.items():
        number, unit = name.split()
        hz = float(number) * (1000 if unit == "kHz" else 1)
        np.testing.assert_allclose(place, np.interp(hz, centres, np.arange(num_mels)), atol=0.05)


def test_removed_patches_are_grey_and_silence_is_dark():
    grid = PatchGrid((64, 32), (16, 16), (16, 16))
    original = torch.full((1, 64, 32), -15.9)
    original[:, :, 16:] = torch.linspace(-10, 5, 64)[:, None]
    mask = torch.arange(8)[None] % 4 < 2  # every second time step
    figure = reconstruction_figure(original, original, mask, grid)
    pixels = figure_to_array(figure)
    axis = panels(figure)[0, 1]
    for token, removed in enumerate(mask[0].tolist()):
        time, mel = divmod(token, 2)
        x, y = axis.transData.transform(((time + 0.5) * 0.16, mel * 16 + 7.5))
        pixel = pixels[-1 - int(y), int(x)].astype(int)
        if removed:
            assert pixel.tolist() == [GREY] * 3
        elif mel == 0:
            assert pixel.max() < 40
        else:
            assert np.ptp(pixel) > 40


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_diverged_can_be_drawn(value):
    original, reconstruction, mask = random_case(GRIDS[0], clips=1, seed=3)
    figure = reconstruction_figure(original, torch.full_like(reconstruction, value), mask, GRIDS[0])
    assert figure_to_array(figure).shape[2] == 3
    assert shown(figure)[:, :2].isfinite().any()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"original": torch.zeros(2, 1, 48, 32)}, r"original has shape \(2, 1, 48, 32\), expected \(2, 48, 32\)"),
        ({"reconstruction": torch.zeros(1, 48, 32)}, r"reconstruction has shape \(1, 48, 32\), expected \(2, 48, 32\)"),
        ({"mask": torch.zeros(2, 7, dtype=torch.bool)}, r"mask has shape \(2, 7\), expected \(2, 6\)"),
        ({"mask": torch.zeros(2, 6)}, r"mask is of torch.float32, expected torch.bool"),
        ({"names": ["one"]}, r"names has 1 entries, expected one for each of 2 clips"),
    ],
)
def test_what_does_not_go_together_is_refused(change, error):
    original, reconstruction, mask = random_case(GRIDS[0], clips=2, seed=4)
    inputs = {"original": original, "reconstruction": reconstruction, "mask": mask, "names": None, **change}
    with pytest.raises((ValueError, TypeError), match=f"^{error}$"):
        reconstruction_figure(**inputs, grid=GRIDS[0])


def test_no_clips_are_refused():
    with pytest.raises(ValueError, match=r"^original has shape \(0, 48, 32\), expected \(1, 48, 32\)$"):
        reconstruction_figure(*random_case(GRIDS[0], clips=0, seed=0), GRIDS[0])


def test_a_saved_figure_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "picture.png"
    figure = reconstruction_figure(*random_case(GRIDS[0], clips=1, seed=5), GRIDS[0])
    save_figure(figure, path)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    saved, drawn = np.array(Image.open(path).convert("RGB"), dtype=float), figure_to_array(figure)
    assert saved.shape == drawn.shape
    assert np.abs(saved - drawn).mean() < 0.5  # each drawing of a figure lays it out anew
    content = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    other = reconstruction_figure(*random_case(GRIDS[0], clips=2, seed=6), GRIDS[0])
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="no space left"):
            save_figure(other, path)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    assert path.read_bytes() == content
    save_figure(other, path)
    assert path.read_bytes() != content


def small_model(**settings: Any) -> AudioMAE:
    torch.manual_seed(0)
    config = AudioMAEConfig(
        spec_size=(48, 32),
        embed_dim=16,
        depth=1,
        num_heads=2,
        decoder_dim=16,
        decoder_depth=2,
        decoder_heads=2,
        bias_dropout=0.5,
        **settings,
    )
    return AudioMAE(config)


@pytest.mark.parametrize(("clips", "rows", "norm_target"), [(1, 1, True), (3, 2, True), (2, 2, False)])
def test_examples_of_a_model(clips, rows, norm_target):
    model = small_model(norm_target=norm_target)
    generator = torch.Generator().manual_seed(7)
    spec = torch.randn(clips, 1, 48, 32, generator=generator)
    mask = PatchMask.random(torch.arange(clips), model.grid, 0.5)
    mean, std = -4.2, 4.5
    model.train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    names = [f"clip {clip}" for clip in range(clips)]
    figure = reconstruction_examples(model, LogMel(mean=mean, std=std), spec, mask, names=names, max_clips=2)
    assert [module.training for module in model.modules()] == modes
    assert [axis.get_ylabel() for axis in panels(figure)[:, 0]] == names[:rows]
    title = panels(figure)[0, 2].get_title()
    assert title == ("reconstruction (true patch mean and std)" if norm_target else "reconstruction")

    model.eval()
    expected = model.reconstruct(spec, model(spec, mask, return_pred=True))
    panel = shown(figure)
    torch.testing.assert_close(panel[:, 0], spec[:rows, 0] * (2 * std) + mean)
    torch.testing.assert_close(panel[:, 2], expected[:rows, 0] * (2 * std) + mean)
    assert not covered(~mask.mask[:rows], model.grid).all()
    removed = panel[:, 1].isnan()
    torch.testing.assert_close(removed, covered(mask.mask[:rows], model.grid))
    torch.testing.assert_close(panel[:, 2][~removed], panel[:, 0][~removed])
    assert (panel[:, 2] - panel[:, 0])[removed].abs().mean() > 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_fails_gets_its_mode_back():
    model = small_model().train()
    mask = PatchMask.random(torch.arange(2), model.grid, 0.5)
    with pytest.raises(ValueError, match="spec"):
        reconstruction_examples(model, LogMel(), torch.zeros(2, 3, 48, 32), mask)
    with pytest.raises((ValueError, RuntimeError)):
        reconstruction_examples(model, LogMel(), torch.zeros(2, 1, 40, 32), mask)
    assert all(module.training for module in model.modules())

"""Pictures of reconstructions: original, masked input and reconstruction side by side."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from audiomae.atomic import replacing
from audiomae.frontend import LogMel, hz_to_mel
from audiomae.grid import PatchGrid
from audiomae.masking import PatchMask
from audiomae.model import AudioMAE

MAX_LABEL = 22


def reconstruction_figure(
    original: Tensor,
    reconstruction: Tensor,
    mask: Tensor,
    grid: PatchGrid,
    *,
    names: Sequence[str] | None = None,
    reconstruction_title: str = "reconstruction",
    sample_rate: int = 16000,
    hop_ms: float = 10.0,
    low_hz: float = 20.0,
    high_hz: float | None = None,
) -> Figure:
    """Draw a row of original, masked input and reconstruction for each clip, all on one colour scale.

    The scale spans the originals but for their most extreme values. Grey is what there is nothing to show of: in the
    masked input, values that no visible patch covers; in the reconstruction, a margin that no patch covers; anywhere,
    values that are not finite.

    Args:
        original: ``(B, frames, mel bins)`` in log-mel units, B at least 1.
        reconstruction: Of the same shape and units.
        mask: ``(B, L)`` bool, True where a patch is removed.
        grid: The grid of the L patches.
        names: One for each clip.
        reconstruction_title: What stands above the reconstructions.
        sample_rate: Samples a second.
        hop_ms: Milliseconds from one frame to the next.
        low_hz: Lower edge of the lowest mel filter.
        high_hz: Upper edge of the highest one; None or 0 is half the sample rate.

    Raises:
        ValueError: Shapes or counts that do not go together.
        TypeError: The mask is not bool.
    """
    clips = max(len(mask), 1)
    shapes = {"original": (clips, *grid.spec_size), "mask": (clips, grid.num_patches)}
    shapes["reconstruction"] = shapes["original"]
    for name, tensor in {"original": original, "reconstruction": reconstruction, "mask": mask}.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is of {mask.dtype}, expected torch.bool")
    if names is not None and len(names) != clips:
        raise ValueError(f"names has {len(names)} entries, expected one for each of {clips} clips")

    original, reconstruction = (spec.detach().float().cpu() for spec in (original, reconstruction))
    mask = mask.cpu()
    kept = (~mask).float().mean().item()
    visible, inside = covered(~mask, grid), covered(torch.ones_like(mask), grid)
    panels = [
        ("original", original),
        (f"masked input ({kept:.0%} of patches visible)", original.where(visible, math.nan)),
        (reconstruction_title, reconstruction.where(inside, math.nan)),
    ]
    finite = original[original.isfinite()].numpy()
    darkest, brightest = np.percentile(finite, [0.5, 99.9]) if finite.size else (0.0, 1.0)
    frames, num_mels = grid.spec_size
    style = {
        "cmap": matplotlib.colormaps["magma"].with_extremes(bad="0.8"),
        "vmin": darkest,
        "vmax": brightest,
        "extent": (0, frames * hop_ms / 1000, -0.5, num_mels - 0.5),
        "origin": "lower",
        "aspect": "auto",
        "interpolation": "nearest",
    }

    figure = Figure(figsize=(13, 0.8 + 1.7 * clips), dpi=120, layout="constrained")
    axes = figure.subplots(clips, len(panels), sharex=True, sharey=True, squeeze=False)
    for column, (title, specs) in zip(axes.T, panels, strict=True):
        column[0].set_title(title, fontsize="medium")
        column[-1].set_xlabel("time (s)")
        images = [axis.imshow(spec.numpy().T, **style) for axis, spec in zip(column, specs, strict=True)]
    ticks = frequency_ticks(num_mels, low_hz, high_hz or sample_rate / 2)
    axes[0, 0].set_yticks(list(ticks.values()), list(ticks))
    for axis, name in zip(axes[:, 0], names or [""] * clips, strict=True):
        label = name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL // 2 - 1]}…{name[-MAX_LABEL // 2 :]}"
        axis.set_ylabel(label, parse_math=False)
    figure.colorbar(images[0], ax=axes, label="log mel energy", extend="both", pad=0.01, aspect=15 * clips)
    return figure


def reconstruction_examples(
    model: AudioMAE,
    front_end: LogMel,
    spec: Tensor,
    mask: PatchMask,
    *,
    names: Sequence[str] | None = None,
    max_clips: int = 4,
) -> Figure:
    """Let a model reconstruct the first clips of a batch, and draw them in log-mel units.

    The model runs in evaluation mode and is left as it was. If it predicts normalised patches, these get the mean and
    deviation of the originals, as in MAE's figures; the title says so, for then even an untrained model looks capable.

    Args:
        model: The model itself, neither compiled nor wrapped.
        front_end: What made the spectrograms.
        spec: Spectrograms ``(B, 1, frames, mel bins)``, on the device of the model.
        mask: Of the whole batch, on the same device.
        names: One for each clip of the batch.
        max_clips: Rows to draw at most.

    Raises:
        ValueError: Spectrograms of several channels, or shapes that do not go together.
    """
    if spec.dim() != 4 or spec.shape[1] != 1:
        raise ValueError(f"spec has shape {tuple(spec.shape)}, expected (B, 1, frames, mel bins)")
    spec, mask = spec[:max_clips], PatchMask(*(tensor[:max_clips] for tensor in mask))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            reconstruction = model.reconstruct(spec, model(spec, mask, return_pred=True))
    finally:
        for module, training in modes:
            module.training = training
    original, reconstruction = (front_end.denormalize(x.float().squeeze(1)) for x in (spec, reconstruction))
    return reconstruction_figure(
        original,
        reconstruction,
        mask.mask,
        model.grid,
        names=None if names is None else names[:max_clips],
        reconstruction_title=f"reconstruction{' (true patch mean and std)' * model.config.norm_target}",
        sample_rate=front_end.sample_rate,
        hop_ms=front_end.hop_ms,
        low_hz=front_end.low_hz,
        high_hz=front_end.high_hz,
    )


def covered(patches: Tensor, grid: PatchGrid) -> Tensor:
    """The values that some of the chosen patches cover: ``(B, L)`` bool to ``(B, frames, mel bins)`` bool."""
    values = patches.float()[:, :, None].expand(-1, -1, math.prod(grid.patch_size))
    return grid.unpatchify(values.contiguous()).squeeze(1) > 0


def frequency_ticks(num_mels: int, low_hz: float, high_hz: float) -> dict[str, float]:
    """The mel bins, counted from 0, whose centres lie at round frequencies, by the frequency's name.

    Kaldi's centres divide ``[low_hz, high_hz]`` into ``num_mels + 1`` equal parts on the mel scale.
    """
    low, high = hz_to_mel(low_hz), hz_to_mel(high_hz)
    names = {"250 Hz": 250, "500 Hz": 500, **{f"{khz} kHz": khz * 1000 for khz in (1, 2, 4, 8, 16)}}
    bins = {name: (hz_to_mel(hz) - low) / (high - low) * (num_mels + 1) - 1 for name, hz in names.items()}
    return {name: place for name, place in bins.items() if 0 <= place <= num_mels - 1}


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Save a figure in the format of the path's suffix; a crash leaves the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format=path.suffix[1:])


def figure_to_array(figure: Figure) -> np.ndarray:
    """Draw a figure into uint8 pixels ``(height, width, 3)``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]

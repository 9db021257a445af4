"""Let a pre-trained Audio-MAE reconstruct what is masked of sound files: the paper's figure, and the same to listen to.

    python -m audiomae.reconstruct kick.wav more-clips/ --checkpoint runs/demo/weights.safetensors --out pictures
    python -m audiomae.reconstruct speech.flac --checkpoint weights.safetensors --mask time --ratio 0.3 --start 12.5

For kick.wav, the folder gets kick.png with the original, the masked and the reconstructed spectrogram, and as sounds
kick-original.wav, kick-masked.wav and kick-reconstruction.wav. All three are made from log-mel spectrograms, by inverse
mel filters and Griffin-Lim, the original too: what differs between them is the mask's and the model's doing. They have
one scale, and what is removed is silent in the masked one.

A model hears a fixed number of frames: of a longer file the part from --start on; a shorter one is padded. Loss, figure
and sounds end before the first patch that holds padding. A model with norm_target predicts patches without their mean
and deviation; its reconstructions take the true ones, as in MAE's figures.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import soundfile as sf
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from audiomae.atomic import replacing
from audiomae.checkpoints import load_model
from audiomae.data import ClipError, read_manifest, read_waveform
from audiomae.frontend import LogMel
from audiomae.grid import PatchGrid
from audiomae.inversion import SILENCE, invert_log_mel
from audiomae.masking import PatchMask
from audiomae.model import AudioMAE
from audiomae.training.config import SetupError
from audiomae.training.distributed import join_ranks
from audiomae.training.pictures import covered, reconstruction_figure, save_figure

PEAK = 10 ** (-1 / 20)  # -1 dBFS
SOUNDS = ("original", "masked", "reconstruction")


@dataclass(frozen=True)
class ReconstructConfig:
    """Settings of the command."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Sound files, or folders of them."""
    checkpoint: str
    """Pre-trained model with its decoder: a file or hub id."""
    out: Path = Path("runs/reconstruct")
    """Folder for pictures and sounds."""

    mask: Literal["random", "time", "frequency", "time_frequency"] = "random"
    """Which patches are removed together."""
    ratio: float = 0.8
    """Share of patches (time steps, with time and time_frequency) that is removed."""
    ratio_frequency: float = 0.5
    """Share of frequencies that time_frequency removes."""
    seed: int = 0
    """Seed of the mask, one for all files, and of the sounds' phases."""

    start: float = 0.0
    """Where in each file to start, s."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes a GPU where there is one."""


def parse_arguments(arguments: Sequence[str] | None = None) -> ReconstructConfig:
    """Read the command line."""
    return tyro.cli(ReconstructConfig, args=arguments, prog="python -m audiomae.reconstruct", description=__doc__)


@dataclass(frozen=True)
class Job:
    """Everything that the files have in common.

    Attributes:
        paths: The files, by the names under which their results are written.
        model: In evaluation mode.
        front_end: On the CPU, as are the sounds.
        mask: ``(1, L)``, on the device of the model.
    """

    paths: dict[str, str]
    model: AudioMAE
    front_end: LogMel
    mask: PatchMask


def build(config: ReconstructConfig, device: torch.device) -> Job:
    """Find the files, load the model and draw the mask, so that wrong settings are found before any work.

    Raises:
        ValueError: Settings that do not go together, or a checkpoint or folder that does not serve.
        OSError: A checkpoint that is missing or cannot be read, or a folder that cannot be made.
    """
    if not config.files:
        raise ValueError("no files given, expected at least one sound file or folder")
    if not 0 <= config.start < math.inf:
        raise ValueError(f"start is {config.start}, expected seconds from 0 up")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed is {config.seed}, expected at least 0 and less than 2**63")
    paths = name_files(find_files(config.files))
    model = load_model(config.checkpoint).to(device).eval()
    if model.config.in_channels != 1:
        raise ValueError(
            f"{config.checkpoint} is a model of {model.config.in_channels} channels, expected 1: files are read as mono"
        )
    mask = draw_mask(config, model.grid)
    inputs = {Path(path).resolve() for path in paths.values()}
    for name in paths:
        for result in result_paths(config.out, name):
            if result.resolve() in inputs:
                raise ValueError(f"out is {config.out}, where {result} would overwrite an input")
    config.out.mkdir(parents=True, exist_ok=True)
    return Job(paths, model, model.config.front_end(), mask.to(device))


def find_files(sources: Iterable[str]) -> list[str]:
    """List the files, and all sound files of folders; whether they can be read is seen later.

    Raises:
        ManifestError: A folder without sound files.
    """
    paths = []
    for source in sources:
        if Path(source).is_dir():
            manifest = read_manifest(source)
            paths += [manifest.path(clip) for clip in range(len(manifest))]
        else:
            paths.append(source)
    return paths


def name_files(paths: Iterable[str]) -> dict[str, str]:
    """Name each file's results by its stem; later ones of the same stem get -2, -3, ..."""
    named: dict[str, str] = {}
    for path in paths:
        stem, number = Path(path).stem, 1
        name = stem
        while name in named:
            number += 1
            name = f"{stem}-{number}"
        named[name] = path
    return named


def result_paths(out: Path, name: str) -> list[Path]:
    """The files that a clip gives: its picture, then its sounds."""
    return [out / f"{name}.png", *(out / f"{name}-{sound}.wav" for sound in SOUNDS)]


def draw_mask(config: ReconstructConfig, grid: PatchGrid) -> PatchMask:
    """Draw one mask ``(1, L)``, so that a file's results do not depend on the others.

    Raises:
        ValueError: A ratio that keeps or removes nothing.
    """
    seeds = torch.tensor([config.seed])
    if config.mask == "time_frequency":
        return PatchMask.time_frequency(seeds, grid, config.ratio, config.ratio_frequency)
    draw = {"random": PatchMask.random, "time": PatchMask.time, "frequency": PatchMask.frequency}[config.mask]
    return draw(seeds, grid, config.ratio)


class Reconstruction(NamedTuple):
    """Spectrograms of a clip in log-mel units, ``(frames, mel bins)`` on the CPU, and how well patches are predicted.

    Attributes:
        original: Of the clip, up to the first patch that holds padding.
        masked: Silent where a patch is removed.
        reconstruction: Predicted where a patch is removed.
        patch_rows: Time steps of the patch grid that these span.
        removed: Patches that are removed in them.
        loss: On these.
        baseline_loss: Of each one's mean in its place.
    """

    original: Tensor
    masked: Tensor
    reconstruction: Tensor
    patch_rows: int
    removed: int
    loss: float
    baseline_loss: float


@torch.no_grad()
def reconstruct(job: Job, waveform: Tensor) -> Reconstruction:
    """Mask a clip and let the model fill it in.

    Args:
        job: Model, front end and mask.
        waveform: ``(samples,)``, at most what the model hears.

    Raises:
        ValueError: A clip shorter than a patch, or one of which nothing is removed.
    """
    model, front_end, grid, mask = job.model, job.front_end, job.model.grid, job.mask
    (patch, _), (stride, _) = grid.patch_size, grid.patch_stride
    frames = front_end.num_frames(len(waveform))
    if frames < patch:
        raise ValueError(
            f"{len(waveform)} samples at {front_end.sample_rate} Hz, expected at least the "
            f"{front_end.num_samples(patch)} of a patch"
        )
    # A patch that is partly padding has the padding's mean and deviation: its reconstruction would end in a burst.
    patch_rows = min((frames - patch) // stride + 1, grid.shape[0])
    if patch_rows < grid.shape[0]:
        frames = patch_rows * stride
    # And the patches of padding alone are easy: both losses would look better than they are.
    removed = mask.ids_removed[:, mask.ids_removed[0] < patch_rows * grid.shape[1]]
    if not removed.numel():
        raise ValueError(f"the mask removes none of its {patch_rows} x {grid.shape[1]} patches: try another --seed")
    mask = mask._replace(ids_removed=removed)

    spec = front_end(waveform[None], grid.spec_size[0]).to(mask.mask.device)
    output = model(spec, mask, return_pred=True)
    filled = model.reconstruct(spec, output)
    original, reconstruction = (front_end.denormalize(x)[0, 0, :frames].cpu() for x in (spec, filled))
    visible = covered(~mask.mask, grid)[0, :frames].cpu()
    return Reconstruction(
        original,
        original.where(visible, SILENCE),
        reconstruction,
        patch_rows,
        removed.numel(),
        output.loss.item(),
        model.baseline_loss(spec, mask).item(),
    )


def draw(job: Job, result: Reconstruction, name: str) -> Figure:
    """Draw a clip, its masked form and its reconstruction."""
    grid, front_end = job.model.grid, job.front_end
    if result.patch_rows < grid.shape[0]:
        frames = (result.patch_rows - 1) * grid.patch_stride[0] + grid.patch_size[0]
        grid = PatchGrid((frames, grid.spec_size[1]), grid.patch_size, grid.patch_stride)
    rest = (0, 0, 0, grid.spec_size[0] - len(result.original))  # where patches overlap; drawn in grey
    return reconstruction_figure(
        F.pad(result.original, rest, value=math.nan)[None],
        F.pad(result.reconstruction, rest, value=math.nan)[None],
        job.mask.mask[:, : grid.num_patches],
        grid,
        names=[name],
        reconstruction_title=f"reconstruction{' (true patch mean and std)' * job.model.config.norm_target}",
        sample_rate=front_end.sample_rate,
        hop_ms=front_end.hop_ms,
        low_hz=front_end.low_hz,
        high_hz=front_end.high_hz,
    )


def save_sounds(job: Job, result: Reconstruction, seed: int, paths: Sequence[Path]) -> float:
    """Write the three sounds, all made softer alike where the peak of one exceeds -1 dBFS.

    Returns:
        The gain, at most 1.

    Raises:
        ValueError: A model that predicts values which are no energies.
    """
    spectrograms = torch.stack([result.original, result.masked, result.reconstruction])
    sounds = invert_log_mel(spectrograms, job.front_end, seed=seed)
    gain = PEAK / max(sounds.abs().max().item(), PEAK)
    for path, sound in zip(paths, sounds, strict=True):
        with replacing(path) as temporary:
            sf.write(temporary, (sound * gain).numpy(), job.front_end.sample_rate, subtype="PCM_16", format="WAV")
    return gain


def process(config: ReconstructConfig, job: Job, name: str) -> list[str]:
    """Do everything for one file; return lines that tell what came of it.

    Raises:
        ClipError: A file that cannot be read.
        ValueError: One that ends before the start, or is too short.
    """
    front_end, rate = job.front_end, job.front_end.sample_rate
    capacity = front_end.num_samples(job.model.grid.spec_size[0])
    # One sample more than the model hears tells whether the file goes on.
    waveform = read_waveform(job.paths[name], rate, config.start, (capacity + 1) / rate)
    goes_on, waveform = len(waveform) > capacity, waveform[:capacity]
    result = reconstruct(job, waveform)
    picture, *sounds = result_paths(config.out, name)
    save_figure(draw(job, result, name), picture)
    gain = save_sounds(job, result, config.seed, sounds)

    samples = front_end.num_samples(len(result.original))
    part = f"{config.start:.2f} to {config.start + samples / rate:.2f} s"
    if goes_on:
        part += " of a longer file"
    elif result.patch_rows < job.model.grid.shape[0]:
        left_out = (len(waveform) - samples) / rate
        part += f", padded to {capacity / rate:.2f} s; the last {left_out:.3f} s of the file fill no patch"
    lines = [
        f"{job.paths[name]}: {part}",
        f"  loss {result.loss:.4f} on {result.removed} removed patches; "
        f"the mean of every patch scores {result.baseline_loss:.4f}",
        f"  wrote {picture} and {config.out / name}-{{{','.join(SOUNDS)}}}.wav",
    ]
    if gain < 1:
        lines.append(f"  sounds are {-20 * math.log10(gain):.1f} dB softer than the file, lest they clip")
    return lines


def run(config: ReconstructConfig, job: Job) -> int:
    """Do all files; return how many of them failed, each of which is named in a line."""
    if job.model.config.norm_target:
        print("reconstructions take the true mean and deviation of each removed patch: the model predicts neither")
    failed = 0
    for name, path in job.paths.items():
        try:
            print("\n".join(process(config, job, name)), flush=True)
        except (ClipError, ValueError) as error:
            failed += 1
            reason = str(error)
            print(f"audiomae.reconstruct: error: {reason if path in reason else f'{path}: {reason}'}", file=sys.stderr)
    if failed:
        print(f"audiomae.reconstruct: {failed} of {len(job.paths)} files could not be done", file=sys.stderr)
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Wrong settings end it with one line and exit status 2. A file that cannot be done is named in a line, the others are
    done, and the exit status is 1.
    """
    try:
        config = parse_arguments(arguments)
        with join_ranks(config.device) as ranks:
            try:
                failed = run(config, build(config, ranks.device))
            except (ValueError, OSError, sf.LibsndfileError) as error:
                raise SetupError(str(error)) from error
    except SetupError as error:
        print(f"audiomae.reconstruct: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

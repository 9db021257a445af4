"""The one place that derives randomness.

Every random draw on a clip is a function of (seed, epoch, clip, purpose) and of nothing else: not of the worker, the
rank, the batch size or the draws made before it. So a run gives the same samples on any number of workers and devices,
and resumes exactly. Different purposes ("crop", "gain", "mask", ...) give independent streams.
"""

import hashlib
import struct

import numpy as np
import torch


def _derive(purpose: str, *numbers: int) -> int:
    """Hash integers to 63 bits, the same on every platform and Python; BLAKE2's personalisation parts the purposes."""
    try:
        packed = struct.pack(f"<{len(numbers)}q", *numbers)
    except struct.error as error:
        raise ValueError(f"seed, epoch and clip must be integers of 64 bits, got {numbers}") from error
    digest = hashlib.blake2b(packed, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


def clip_seed(seed: int, epoch: int, clip: int, purpose: str) -> int:
    """Seed in [0, 2**63) for one purpose on one visit of one clip.

    Args:
        seed: Seed of the run.
        epoch: Number of the visit: the first element of the pairs that ``ClipBatches`` yields.
        clip: Index of the clip in its manifest.
        purpose: Name of the draw, at most 16 bytes.

    Raises:
        ValueError: For a number that does not fit 64 bits, or a longer purpose.
    """
    return _derive(purpose, seed, epoch, clip)


def clip_generator(seed: int, epoch: int, clip: int, purpose: str) -> np.random.Generator:
    """Generator for one purpose on one visit of one clip; arguments and errors as in ``clip_seed``."""
    return np.random.Generator(np.random.PCG64(clip_seed(seed, epoch, clip, purpose)))


def epoch_generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """Generator for what is drawn once an epoch, as the order of its clips; independent of every clip's generators."""
    return np.random.Generator(np.random.PCG64(_derive(purpose, seed, epoch)))


def visit_seeds(seed: int, pairs: torch.Tensor, purpose: str) -> torch.Tensor:
    """Seeds for what a device draws for a batch, one a row.

    Args:
        seed: Seed of the run.
        pairs: (B, 2) int64 on the CPU, the (epoch, clip) of each row, as batches of a ``ClipDataset`` carry them.
        purpose: Name of the draw, at most 16 bytes: "mask" for ``PatchMask.random`` and its siblings.

    Returns:
        (B,) int64 on the CPU.

    Raises:
        ValueError: For pairs of another shape or type.
    """
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs must be int64 of shape (B, 2), got {pairs.dtype} of shape {tuple(pairs.shape)}")
    return torch.tensor([clip_seed(seed, epoch, clip, purpose) for epoch, clip in pairs.tolist()], dtype=torch.int64)


def seed_device(device: torch.device, seed: int, step: int) -> None:
    """Seed what a model draws in a training step (dropout) from the run's seed and the step alone.

    All ranks and micro-batches of a step draw the same, so that it depends neither on their number nor, in a resumed
    run, on what was drawn before.

    Args:
        device: Where the model is.
        seed: Seed of the run.
        step: Number of the step.
    """
    number = _derive("dropout", seed, step)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    else:
        # torch.manual_seed would also queue a seed and the stack of its caller for a GPU that is never used.
        torch.default_generator.manual_seed(number)

"""Patches read from an image by index arithmetic, and their normalisation: what several kernels share.

With one channel a row of a patch is contiguous in the image, which Triton can prove because a patch's sizes are
constants: it then loads 128 bits at a time.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mae_kernels.patches import grid_shape


@triton.jit
def patch_start(clip, patch, stride_clip, stride_row, grid_columns, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr):
    """Offset of a patch's first value in the images, int64."""
    top = (patch // grid_columns) * STRIDE_Y
    left = (patch % grid_columns) * STRIDE_X
    return clip.to(tl.int64) * stride_clip + top * stride_row + left


@triton.jit
def value_offset(value, stride_channel, stride_row, PATCH_WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Offset of a patch's values from its first; they are numbered as :mod:`mae_kernels.patches` orders them."""
    pixel = value // CHANNELS
    offset = (pixel // PATCH_WIDTH) * stride_row + pixel % PATCH_WIDTH
    if CHANNELS > 1:
        offset += (value % CHANNELS) * stride_channel
    return offset


@triton.jit
def moments(x, inside, count):
    """Mean of each row of ``x``, ``count`` values of which lie ``inside``, and the sum of squares about it."""
    mean = tl.sum(tl.where(inside, x, 0.0), axis=1) / count
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return mean, tl.sum(centred * centred, axis=1)


def grid_columns(image: Tensor, patch_size: Sequence[int], stride: Sequence[int]) -> int:
    """Patches in a row of the grid of ``image (B, C, H, W)``."""
    size = (image.shape[2], image.shape[3])
    return grid_shape(size, (patch_size[0], patch_size[1]), (stride[0], stride[1]))[1]


def patch_constants(image: Tensor, patch_size: Sequence[int], stride: Sequence[int]) -> dict[str, int]:
    """What a kernel knows of the patches when it is compiled."""
    return {
        "PATCH_HEIGHT": patch_size[0],
        "PATCH_WIDTH": patch_size[1],
        "CHANNELS": image.shape[1],
        "STRIDE_Y": stride[0],
        "STRIDE_X": stride[1],
    }

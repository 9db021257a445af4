"""Kernel of :mod:`mae_kernels.ops.random_mask`: the mathematics and the tensors are told there.

A program ranks a block of a row's positions. It draws the noise of all of the row again, block by block, because
that is cheaper than to share it, and counts what is smaller: nothing is read but the seed, nothing is sorted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mae_kernels._hash import HASH_MULTIPLIERS, KEY_SALTS
from mae_kernels.kernels._registration import register

_MULTIPLIER_1, _MULTIPLIER_2 = (tl.constexpr(multiplier) for multiplier in HASH_MULTIPLIERS)
_SALT_1, _SALT_2 = (tl.constexpr(salt) for salt in KEY_SALTS)

# A lane of a warp draws the noise of one other position for 16 of the warp's own. With more of these, what is drawn
# once and kept for the comparisons spills.
_BLOCK, _BLOCK_OTHERS = 64, 32


@triton.jit
def _hash32(x):
    """``ops.random_mask._hash32`` of uint32."""
    x = x ^ (x >> 16)
    x = x * _MULTIPLIER_1
    x = x ^ (x >> 15)
    x = x * _MULTIPLIER_2
    return x ^ (x >> 15)


@triton.jit
def _noise(position, key1, key2):
    return _hash32(_hash32(position.to(tl.uint32) ^ key1) ^ key2)


@triton.jit
def _rank_kernel(
    seeds_ptr,  # (B,) int64
    ids_keep_ptr,  # (B, keep) int64
    ids_removed_ptr,  # (B, length - keep) int64
    ids_restore_ptr,  # (B, length) int64
    mask_ptr,  # (B, length) bool
    length,
    keep,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    seed = tl.load(seeds_ptr + row)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    key1 = _hash32(_hash32(high ^ _SALT_1) ^ low)
    key2 = _hash32(_hash32(low ^ _SALT_2) ^ high)

    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    noise = _noise(position, key1, key2)
    smaller = tl.zeros((BLOCK, BLOCK_OTHERS), dtype=tl.int32)
    for start in range(0, length, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        other_noise = tl.where(other < length, _noise(other, key1, key2), 0xFFFFFFFF)  # the largest is never smaller
        smaller += (other_noise[None, :] < noise[:, None]).to(tl.int32)
    rank = tl.sum(smaller, axis=1)

    inside = position < length
    tl.store(ids_restore_ptr + row * length + position, rank, mask=inside)
    tl.store(mask_ptr + row * length + position, rank >= keep, mask=inside)
    tl.store(ids_keep_ptr + row * keep + rank, position, mask=inside & (rank < keep))
    tl.store(ids_removed_ptr + row * (length - keep) + rank - keep, position, mask=inside & (rank >= keep))


def _outputs(seeds: Tensor, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = seeds.shape[0]
    ids_keep, ids_removed, ids_restore = (seeds.new_empty(batch, size) for size in (keep, length - keep, length))
    return ids_keep, ids_removed, ids_restore, seeds.new_empty(batch, length, dtype=torch.bool)


@register(outputs=_outputs)
def random_mask(seeds: Tensor, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous ``seeds (B,)`` int64 -> ids kept, removed and restoring, int64; and the mask, bool."""
    outputs = _outputs(seeds, length, keep)
    grid = (seeds.shape[0], triton.cdiv(length, _BLOCK))
    _rank_kernel[grid](seeds, *outputs, length, keep, BLOCK=_BLOCK, BLOCK_OTHERS=_BLOCK_OTHERS)
    return outputs

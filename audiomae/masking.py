"""Which patches of a spectrogram the encoder sees: random, time, frequency and time + frequency masking."""

from typing import NamedTuple

import torch
from mae_kernels import random_mask
from mae_kernels.ops.random_mask import noise
from torch import Tensor

from audiomae.grid import PatchGrid


def count_kept(total: int, ratio: float) -> int:
    """Patches, rows or columns that stay when ``ratio`` of ``total`` is removed: ``int(total * (1 - ratio))``.

    This is the official rule, float rounding included.

    Raises:
        ValueError: The ratio keeps or removes nothing.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask ratio is {ratio}, expected a number between 0 and 1")
    kept = int(total * (1 - ratio))
    if not 0 < kept < total:
        raise ValueError(f"a mask ratio of {ratio} keeps {kept} of {total}, expected one that keeps and removes some")
    return kept


class PatchMask(NamedTuple):
    """Kept and removed patches of each clip of a batch. Every row keeps the same number K of L patches.

    Rows are drawn from seeds: a row depends on its seed alone, never on rank, batch or device.

    Attributes:
        ids_keep: ``(B, K)`` int64, the kept patches.
        ids_removed: ``(B, L - K)`` int64, the others.
        ids_restore: ``(B, L)`` int64, the place of each patch in ``[ids_keep, ids_removed]``.
        mask: ``(B, L)`` bool, True where removed.
    """

    ids_keep: Tensor
    ids_removed: Tensor
    ids_restore: Tensor
    mask: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PatchMask":
        """Move all four tensors."""
        return PatchMask(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    @classmethod
    def random(cls, seeds: Tensor, grid: PatchGrid, ratio: float, impl: str = "auto") -> "PatchMask":
        """Remove ``ratio`` of all patches, each as likely as any other (the paper's "unstructured" masking).

        Args:
            seeds: ``(B,)`` int64.
            grid: The patch grid.
            ratio: Share of patches to remove.
            impl: Form of the operator.

        Raises:
            ValueError: The ratio keeps or removes nothing.
        """
        return cls(*random_mask(seeds, grid.num_patches, count_kept(grid.num_patches, ratio), impl=impl))

    @classmethod
    def time(cls, seeds: Tensor, grid: PatchGrid, ratio: float) -> "PatchMask":
        """Remove ``ratio`` of the time steps, with all their frequencies. Errors as in :meth:`random`."""
        return cls._structured(seeds, grid, time_kept=count_kept(grid.shape[0], ratio), frequency_kept=grid.shape[1])

    @classmethod
    def frequency(cls, seeds: Tensor, grid: PatchGrid, ratio: float) -> "PatchMask":
        """Remove ``ratio`` of the frequencies of the grid at all times. Errors as in :meth:`random`."""
        return cls._structured(seeds, grid, time_kept=grid.shape[0], frequency_kept=count_kept(grid.shape[1], ratio))

    @classmethod
    def time_frequency(cls, seeds: Tensor, grid: PatchGrid, time_ratio: float, frequency_ratio: float) -> "PatchMask":
        """Remove ``time_ratio`` of times and ``frequency_ratio`` of frequencies; errors as in :meth:`random`."""
        time_kept, frequency_kept = count_kept(grid.shape[0], time_ratio), count_kept(grid.shape[1], frequency_ratio)
        return cls._structured(seeds, grid, time_kept=time_kept, frequency_kept=frequency_kept)

    @classmethod
    def _structured(cls, seeds: Tensor, grid: PatchGrid, *, time_kept: int, frequency_kept: int) -> "PatchMask":
        """Keep the patches where a kept time step meets a kept frequency; ids ascend on both sides."""
        times, frequencies = grid.shape
        # One draw serves both axes: its first values rank the time steps, the rest the frequencies.
        draws = noise(seeds, times + frequencies)
        time_removed = draws[:, :times].argsort(1).argsort(1) >= time_kept
        frequency_removed = draws[:, times:].argsort(1).argsort(1) >= frequency_kept
        mask = (time_removed[:, :, None] | frequency_removed[:, None, :]).flatten(1)
        # A stable sort of the flags puts kept before removed and leaves each side in raster order, for a grid of any
        # size.
        ids_shuffle = mask.to(torch.uint8).argsort(dim=1, stable=True)
        return cls._from_shuffle(ids_shuffle, time_kept * frequency_kept)

    @classmethod
    def from_noise(cls, noise: Tensor, ratio: float) -> "PatchMask":
        """Keep the patches of smallest noise, the convention of published MAE code.

        Args:
            noise: ``(B, L)``.
            ratio: Share of patches to remove.

        Raises:
            ValueError: A wrong shape, or a ratio that keeps or removes nothing.
        """
        if noise.dim() != 2:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected (B, L)")
        return cls._from_shuffle(noise.argsort(dim=1, stable=True), count_kept(noise.shape[1], ratio))

    @classmethod
    def _from_shuffle(cls, ids_shuffle: Tensor, keep: int) -> "PatchMask":
        """Keep the first ``keep`` ids of each row of ``ids_shuffle (B, L)``."""
        ids_restore = ids_shuffle.argsort(dim=1)
        return cls(
            ids_shuffle[:, :keep].contiguous(), ids_shuffle[:, keep:].contiguous(), ids_restore, ids_restore >= keep
        )

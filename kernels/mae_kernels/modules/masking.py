"""Random masking of patches (He et al. 2022, section 3)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae_kernels._forms import check_impl
from mae_kernels.modules._sizes import read_grid
from mae_kernels.ops.random_mask import random_mask


class PatchMask(NamedTuple):
    """Kept and removed patches of each sample of a batch; every sample keeps the same number K of L patches.

    Attributes:
        ids_keep: ``(B, K)`` int64, the kept patches, in the order that the encoder sees.
        ids_removed: ``(B, L - K)`` int64, the others.
        ids_restore: ``(B, L)`` int64, the place of each patch in ``[ids_keep, ids_removed]``.
        mask: ``(B, L)`` bool, True where removed.
    """

    ids_keep: Tensor
    ids_removed: Tensor
    ids_restore: Tensor
    mask: Tensor


class RandomMasking(nn.Module):
    """Remove a share of the patches of each sample, all alike likely. The same in training and evaluation.

    Args:
        grid: Patches, as their number or as rows and columns.
        ratio: Share of them to remove, from 0 to below 1: ``int(patches * (1 - ratio))`` are kept, as in MAE.
        impl: Form of the operator.

    Attributes:
        length: Patches, L.
        keep: Kept patches, K.

    Raises:
        ValueError: A grid or ratio out of range, or one that keeps nothing.
    """

    def __init__(self, grid: int | Sequence[int], ratio: float = 0.75, *, impl: str = "auto"):
        super().__init__()
        check_impl(impl)
        _, self.length = read_grid("RandomMasking", grid)
        if not 0 <= ratio < 1:
            raise ValueError(f"RandomMasking: ratio is {ratio}, expected a number from 0 to below 1")
        self.keep = int(self.length * (1 - ratio))
        if self.keep == 0:
            raise ValueError(f"RandomMasking: a ratio of {ratio} keeps 0 of {self.length} patches, expected some")
        self.ratio = ratio
        self.impl = impl

    def forward(
        self,
        seeds: Tensor | None = None,
        *,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> PatchMask:
        """Draw a mask, from seeds or for a batch size.

        Args:
            seeds: ``(B,)`` int64. A sample's mask depends on its seed alone: never on its batch, rank, device or
                implementation.
            batch_size: B, in place of seeds: they are drawn at random, so ranks that are seeded alike draw alike.
            generator: What they are drawn from; by default PyTorch's for the device. torch.compile takes no other.
            device: Where they are drawn and the mask is; by default the generator's, or PyTorch's default device.

        Raises:
            TypeError: Seeds that are not int64.
            ValueError: Neither seeds nor a batch size, or both; seeds of a wrong shape; a generator or device with
                seeds.
        """
        if seeds is None:
            if batch_size is None:
                raise ValueError("RandomMasking: neither of seeds and batch_size given, expected one")
            if device is None and generator is not None:
                device = generator.device
            seeds = torch.randint(2**63 - 1, (batch_size,), generator=generator, device=device)
        elif batch_size is not None:
            raise ValueError("RandomMasking: both of seeds and batch_size given, expected one")
        elif generator is not None or device is not None:
            raise ValueError("RandomMasking: a generator or device given with seeds, expected them with batch_size")
        return PatchMask(*random_mask(seeds, self.length, self.keep, impl=self.impl))

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"length={self.length}, ratio={self.ratio}, keep={self.keep}, impl={self.impl!r}"

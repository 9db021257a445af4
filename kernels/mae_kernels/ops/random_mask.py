r"""Random masking from one seed a row.

Position ``i`` of a row with seed ``s`` draws the 32-bit noise

.. math:: n_i = h(h(i \oplus k_1(s)) \oplus k_2(s))

where ``h`` is a bijective integer hash and ``k_1``, ``k_2`` are two keys hashed from the 64 bits of the seed. ``n``
is a bijection of ``i``, so a row holds no ties and the order is fully defined. The ``keep`` positions of smallest
noise are kept: the rank of a position is the count of smaller noise in its row, as in MAE's double argsort (He et al.
2022, appendix A), which makes the result the same on every device, rank and batch, and in every implementation.

Tensors: ``seeds (B,) int64``; ``ids_keep (B, K)``, ``ids_removed (B, L - K)``, ``ids_restore (B, L)`` int64, ``mask
(B, L)`` bool. Least traffic: 8 B bytes in, B (2 * 8 L + L) bytes out. About 20 L integer operations a row for the
noise and L^2 comparisons for the ranks, or L log L where it is sorted.
"""

import torch
from torch import Tensor

from mae_kernels._checks import check_shapes
from mae_kernels._forms import select
from mae_kernels._hash import HASH_MULTIPLIERS, KEY_SALTS

_LOW_32_BITS = 0xFFFFFFFF


def _hash32(x: Tensor) -> Tensor:
    """Mix 32-bit values held in int64; a bijection."""
    x = x ^ (x >> 16)
    x = (x * HASH_MULTIPLIERS[0]) & _LOW_32_BITS
    x = x ^ (x >> 15)
    x = (x * HASH_MULTIPLIERS[1]) & _LOW_32_BITS
    return x ^ (x >> 15)


def noise(seeds: Tensor, length: int) -> Tensor:
    """Noise of each position, ``(B, length)`` int64 in ``[0, 2^32)``, without ties in a row."""
    low, high = seeds & _LOW_32_BITS, (seeds >> 32) & _LOW_32_BITS
    key1 = _hash32(_hash32(high ^ KEY_SALTS[0]) ^ low)
    key2 = _hash32(_hash32(low ^ KEY_SALTS[1]) ^ high)
    positions = torch.arange(length, device=seeds.device)
    return _hash32(_hash32(positions ^ key1[:, None]) ^ key2[:, None])


def reference(seeds: Tensor, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw masks by sorting twice, as published MAE code does."""
    ids_shuffle = noise(seeds, length).argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :keep].contiguous(), ids_shuffle[:, keep:].contiguous(), ids_restore, ids_restore >= keep


def scatter(seeds: Tensor, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort once: the place of each position is scattered from its order."""
    ids_shuffle = noise(seeds, length).argsort(dim=1)
    places = torch.arange(length, device=seeds.device).expand_as(ids_shuffle)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, places)
    return ids_shuffle[:, :keep].contiguous(), ids_shuffle[:, keep:].contiguous(), ids_restore, ids_restore >= keep


def triton(seeds: Tensor, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count the smaller noise of a row, drawn where it is compared."""
    from mae_kernels.kernels.random_mask import random_mask

    return random_mask(seeds.contiguous(), length, keep)


FORMS = {"reference": reference, "torch": scatter, "triton": triton}


def random_mask(seeds: Tensor, length: int, keep: int, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw which positions of each row are kept and which are removed.

    A row depends on its seed alone: never on rank, batch, device or implementation.

    Args:
        seeds: ``(B,)`` int64, one a row.
        length: Positions in a row.
        keep: Positions kept, 0 to ``length``.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``ids_keep (B, keep)``, the kept positions by ascending noise; ``ids_removed (B, length - keep)``, the others by
        ascending noise; ``ids_restore (B, length)``, the place of each position in ``[ids_keep, ids_removed]``; all
        int64; and ``mask (B, length)`` bool, True where removed.

    Raises:
        TypeError: Seeds that are not int64.
        ValueError: A wrong shape, or ``keep`` outside ``[0, length]``.
    """
    check_shapes("random_mask", seeds=(seeds, "B"))
    if seeds.dtype != torch.int64:
        raise TypeError(f"random_mask: seeds has dtype {seeds.dtype}, expected torch.int64")
    if type(keep) is not int or not 0 <= keep <= length:
        raise ValueError(f"random_mask: keep is {keep}, expected 0 to length = {length}")
    return select("random_mask", FORMS, impl, seeds)(seeds, length, keep)

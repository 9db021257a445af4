r"""Decoder input: visible tokens put back in their places, mask tokens elsewhere, positions added.

.. math:: y_{b,i} = e_i + \begin{cases} x_{b, r} & r < K \\ m & \text{otherwise} \end{cases}

with ``r = ids_restore[b, i]``, the mask token ``m`` and the position embedding ``e`` (He et al. 2022, appendix A).

Tensors: ``tokens (B, [1 +] K, D)``, ``ids_restore (B, L)`` int64, ``mask_token (1, 1, D)``, ``position (L, D)`` or
``(1 + L, D)``; out ``(B, [1 +] L, D)``. Least traffic, forward and backward each: s B (K + L) D + 8 B L bytes for s
bytes a value, and s L D for the position; B L D additions forward, B (L - K) D backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels._checks import check_devices, check_floating, check_ids, check_shapes
from mae_kernels._forms import select
from mae_kernels._positions import check_position, split_position
from mae_kernels._rows import flat_ids


def reference(
    tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, position: Tensor | None, has_cls: bool, keep_cls: bool
) -> Tensor:
    """Append mask tokens, gather, add positions, as published code does."""
    batch, length = ids_restore.shape
    cls, visible = tokens[:, : int(has_cls)], tokens[:, int(has_cls) :]
    masked = mask_token.reshape(1, 1, -1).expand(batch, length - visible.shape[1], -1)
    restored = torch.cat([visible, masked], dim=1)
    restored = restored.gather(1, ids_restore[:, :, None].expand(-1, -1, restored.shape[2]))
    cls_position, position = split_position(position, length)
    if position is not None:
        restored = restored + position
    if not keep_cls:
        return restored
    if cls_position is not None:
        cls = cls + cls_position
    return torch.cat([cls, restored], dim=1)


def overwrite(
    tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, position: Tensor | None, has_cls: bool, keep_cls: bool
) -> Tensor:
    """Write mask tokens and positions everywhere, then the visible tokens over them."""
    batch, length = ids_restore.shape
    cls, visible = tokens[:, : int(has_cls)], tokens[:, int(has_cls) :]
    order = torch.arange(length, device=ids_restore.device).expand(batch, -1)
    ids_keep = torch.empty_like(ids_restore).scatter_(1, ids_restore, order)[:, : visible.shape[1]]
    cls_position, position = split_position(position, length)
    fill = mask_token.reshape(1, -1)
    if position is not None:
        fill = fill + position
        visible = visible + position[ids_keep]
    if keep_cls:
        # The class token is one more row in front, so that nothing is copied to put it there.
        ids_keep = torch.cat([ids_keep.new_zeros(batch, 1), ids_keep + 1], dim=1)
        visible = torch.cat([cls if cls_position is None else cls + cls_position, visible], dim=1)
        length += 1
        fill = F.pad(fill.expand(length - 1, -1), (0, 0, 1, 0))
    dtype = torch.promote_types(visible.dtype, fill.dtype)
    rows = fill.to(dtype).expand(batch, length, -1).flatten(0, 1)
    rows = rows.index_copy(0, flat_ids(ids_keep, length), visible.to(dtype).flatten(0, 1))
    return rows.unflatten(0, (batch, length))


def triton(
    tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, position: Tensor | None, has_cls: bool, keep_cls: bool
) -> Tensor:
    """Write each place once, from its visible token or from the mask token."""
    from mae_kernels.kernels.restore_tokens import restore_tokens

    return restore_tokens(tokens, ids_restore, mask_token, position, has_cls, keep_cls)


FORMS = {"reference": reference, "torch": overwrite, "triton": triton}


def restore_tokens(
    tokens: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    position: Tensor | None = None,
    *,
    has_cls: bool = True,
    keep_cls: bool = False,
    check: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Un-shuffle visible tokens among mask tokens and add the decoder's positions.

    Args:
        tokens: ``(B, [1 +] K, D)``, a class token first if ``has_cls``.
        ids_restore: ``(B, L)`` int64: the place of each position in ``[visible, removed]``.
        mask_token: ``D`` values of any shape, ``(1, 1, D)`` in MAE.
        position: ``(L, D)``, or ``(1 + L, D)`` with that of the class token first.
        has_cls: The tokens start with a class token.
        keep_cls: The result starts with it too; otherwise it is dropped.
        check: Range-check the ids, which waits for the device.
        impl: ``"reference"``, ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``(B, [1 +] L, D)``.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, device or (with ``check``) id; ``keep_cls`` without ``has_cls``.
    """
    sizes = check_shapes("restore_tokens", tokens=(tokens, "B N D"), ids_restore=(ids_restore, "B L"))
    length, dim = sizes["L"], sizes["D"]
    visible = sizes["N"] - int(has_cls)
    if not 0 <= visible <= length:
        raise ValueError(f"restore_tokens: tokens holds {visible} visible tokens, expected 0 to L = {length}")
    if keep_cls and not has_cls:
        raise ValueError("restore_tokens: keep_cls is True with has_cls False, expected tokens with a class token")
    check_floating("restore_tokens", tokens=tokens, mask_token=mask_token, position=position)
    if mask_token.numel() != dim:
        raise ValueError(f"restore_tokens: mask_token has shape {tuple(mask_token.shape)}, expected D = {dim} values")
    check_position("restore_tokens", position, length, dim, has_cls=has_cls)
    check_devices("restore_tokens", tokens=tokens, ids_restore=ids_restore, mask_token=mask_token, position=position)
    check_ids("restore_tokens", "ids_restore", ids_restore, length, values=check)
    return select("restore_tokens", FORMS, impl, tokens)(tokens, ids_restore, mask_token, position, has_cls, keep_cls)

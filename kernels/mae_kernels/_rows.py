"""Rows of a batch by their ids, copied whole: on a CPU many times faster than a gather by expanded indices."""

import torch
from torch import Tensor


def flat_ids(ids: Tensor, length: int) -> Tensor:
    """Ids ``(B, K)`` of rows of ``(B, length, D)`` as ids ``(B * K,)`` of rows of ``(B * length, D)``."""
    starts = torch.arange(ids.shape[0], device=ids.device) * length
    return (ids + starts[:, None]).flatten()


def take_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Take rows ``ids (B, K)`` of ``x (B, L, D)``, as ``(B, K, D)``."""
    rows = x.flatten(0, 1).index_select(0, flat_ids(ids, x.shape[1]))
    return rows.unflatten(0, ids.shape)

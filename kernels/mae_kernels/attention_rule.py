"""Which attention a call takes: the rule, and what carries it out.

Importing this imports PyTorch's compiler.
"""

import torch
from torch import Tensor

from mae_kernels.attention_backends import BACKENDS, device_refusals

RULE: dict[str, tuple[tuple[int, tuple[str, ...]], ...]] = {}
"""Measured orders of preference: by device family, pairs of least number of tokens and order, ascending from 0.

``{"sm90": ((0, ("sdpa-flash",)), (129, ("fa3", "sdpa-flash")))}`` would take PyTorch's FlashAttention up to 128 tokens
on an H100, and flash-attn 3 where it is installed from there. No family has been measured yet.
"""

UNMEASURED = ("fa3", "fa4", "fa2", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
"""The order for GPUs that no measurement has ranked: flash-attn where installed, then PyTorch's own kernels, cuDNN's
after the one whose gradients can be deterministic."""


@torch.compiler.assume_constant_result
def _refusals_of_device(
    device: torch.device, dtype: torch.dtype, deterministic: bool
) -> tuple[str, tuple[tuple[str, str | None], ...]]:
    return device_refusals(device, dtype, deterministic)


def refusals(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> tuple[str, dict[str, str | None]]:
    """Say of each backend why it cannot take such a call, in a few words.

    Args:
        device: Where q, k and v are.
        dtype: In which they are, or autocast has them.
        tokens: N.
        head_dim: Width of a head.

    Returns:
        The family of the device, and by backend the reason, or None where it can.
    """
    family, refused = _refusals_of_device(device, dtype, torch.are_deterministic_algorithms_enabled())
    reasons = {}
    for name, reason in refused:
        backend = BACKENDS[name]
        if reason is None and backend.families is not None and family in backend.families:
            if head_dim % 8 or head_dim > backend.max_head_dim:
                reason = f"takes heads whose width is a multiple of 8 up to {backend.max_head_dim}"
            elif tokens < backend.min_tokens:
                reason = f"takes at least {backend.min_tokens} tokens"
        reasons[name] = reason
    return family, reasons


def preference(family: str, tokens: int) -> tuple[str, ...]:
    """The order in which backends are tried for a number of tokens, before it is left to PyTorch."""
    order: tuple[str, ...] = UNMEASURED if family == "rocm" or family.startswith("sm") else ()
    for least, measured in RULE.get(family, ()):
        if tokens >= least:
            order = measured
    return order


def choose_backend(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> tuple[str, str]:
    """Choose the first backend of the preferred order that can take a call, or leave the choice to PyTorch.

    Args:
        device: Where q, k and v are.
        dtype: In which they are, or autocast has them.
        tokens: N.
        head_dim: Width of a head.

    Returns:
        Its name in :data:`~mae_kernels.attention_backends.BACKENDS`, and a few words why.
    """
    family, refused = refusals(device, dtype, tokens, head_dim)
    why: list[str] = []
    for name in preference(family, tokens):
        reason = refused[name]
        if reason is None:
            why.insert(0, f"first in the order {'measured' if family in RULE else 'not yet measured'} on {family}")
            return name, "; ".join(why)
        why.append(f"{name}: {reason}")
    return "sdpa", "; ".join(["PyTorch picks the kernel", *why])


def readable(x: Tensor) -> Tensor:
    """``x (B, N, heads, d)`` itself if its heads lie as kernels load them, in aligned 16 bytes; else a copy.

    Views of a packed qkv do. A compiled graph takes it that heads start aligned: torch.compile traces neither offsets
    nor all strides.
    """
    unit = 16 // x.dtype.itemsize
    aligned = torch.compiler.is_compiling() or all(step % unit == 0 for step in (*x.stride()[:3], x.storage_offset()))
    return x if x.stride(3) == 1 and aligned else x.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str | None) -> Tensor:
    """Attend by the backend asked for, or by the rule's.

    Args:
        q: ``(B, N, heads, d)``.
        k: As q.
        v: As q.
        scale: Multiplies the products; by default d^-1/2.
        backend: A name in :data:`~mae_kernels.attention_backends.BACKENDS`.

    Returns:
        ``(B, N, heads, d)``.

    Raises:
        ValueError: There is no such backend, or it cannot take the call.
    """
    call = q.device, q.dtype, q.shape[1], q.shape[3]
    if backend is None:
        backend, _ = choose_backend(*call)
    elif backend not in BACKENDS:
        raise ValueError(f"flash_attention: backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    else:
        _, refused = refusals(*call)
        if refused[backend] is not None:
            able = ", ".join(repr(name) for name in BACKENDS if refused[name] is None)
            raise ValueError(f"flash_attention: backend is {backend!r}: {refused[backend]}; expected one of {able}")
    if q.numel() == 0:  # which the others refuse
        backend = "math"
    if BACKENDS[backend].families is not None:
        q, k, v = (readable(x) for x in (q, k, v))
    return BACKENDS[backend].run(q, k, v, scale)

# mypy: disable-error-code="import-not-found, import-untyped"
"""The attention of PyTorch and of flash-attn 2, 3 and 4 behind one signature, and where each can run.

A library is imported when a GPU first could use it; a machine without a GPU imports none. What each takes was read in
its source: flash-attn 2.8 (``csrc/flash_attn/flash_api.cpp``), flash-attn 3 (``hopper/flash_api.cpp``), flash-attn-4
4.0.0b27 (``flash_attn/cute/interface.py``) and PyTorch (``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``).
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel


def _sdpa(kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _fa2(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    from flash_attn.flash_attn_interface import flash_attn_func

    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(q, k, v, softmax_scale=scale, deterministic=deterministic)


def _fa3(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    from flash_attn_interface import flash_attn_func

    deterministic = torch.are_deterministic_algorithms_enabled()
    out = flash_attn_func(q, k, v, softmax_scale=scale, deterministic=deterministic)
    return out[0] if isinstance(out, tuple) else out  # (out, lse) before July 2025


# flash-attn 2 and 3 register operators of their own; into 4, without these, torch.compile would trace and fail.
_LIBRARY = torch.library.Library("mae_kernels", "FRAGMENT")


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attend: ``(B, N, heads, d)`` and, in float32, the log of each row's sum of exponentials ``(B, heads, N)``."""
    from flash_attn.cute.interface import flash_attn_func

    with torch.cuda.device_of(q):
        return flash_attn_func(q, k, v, softmax_scale=scale, return_lse=True)


def flash_attention_4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    with torch.cuda.device_of(q):
        return _flash_attn_bwd(q, k, v, out, grad, lse, softmax_scale=scale, deterministic=deterministic)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


for _function, _fake in ((flash_attention_4, _fake_forward), (flash_attention_4_backward, _fake_backward)):
    _name = _function.__name__
    _LIBRARY.define(torch.library.infer_schema(_function, mutates_args=(), op_name=_name))
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mae_kernels::{_name}", _fake, lib=_LIBRARY)


class _FlashAttention4(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        out, lse = torch.ops.mae_kernels.flash_attention_4(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        deterministic = torch.are_deterministic_algorithms_enabled()
        grads = torch.ops.mae_kernels.flash_attention_4_backward(grad, *ctx.saved_tensors, ctx.scale, deterministic)
        return *grads, None


def _fa4(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return _FlashAttention4.apply(q, k, v, scale)


@dataclass(frozen=True)
class Library:
    """What a backend needs of another package: a module, and functions in it with the keywords they are called by."""

    package: str
    module: str
    keywords: Mapping[str, tuple[str, ...]]

    def missing(self) -> str | None:
        """Import the module and say in a few words why it cannot be used, or None."""
        try:
            module = import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name and f"{self.module}.".startswith(f"{error.name}."):
                return f"{self.package} is not installed"
            return f"{self.module} does not import: {error}"
        except Exception as error:  # a build for another PyTorch fails in many ways, and none may stop the training
            return f"{self.module} does not import: {str(error).partition(chr(10))[0]}"
        for name, keywords in self.keywords.items():
            accepted = inspect.signature(getattr(module, name)).parameters if hasattr(module, name) else {}
            if not set(keywords) <= set(accepted):
                return f"{self.module} is of another version: no {name}({', '.join(keywords)})"
        return None


HALF = (torch.float16, torch.bfloat16)
AMPERE_ON = ("sm80", "sm90", "sm100", "sm110", "sm120")


@dataclass(frozen=True)
class Backend:
    """One way to compute attention, and where it can.

    The limits hold for forward and backward, deterministic or not; where PyTorch's kernels take more on some device,
    PyTorch's own pick finds it.

    Args:
        run: ``(q, k, v, scale)`` to the output, tensors being ``(B, N, heads, d)``.
        families: The GPUs it runs on, as :func:`device_family` names them; None for any device, dtype, shape and
            strides.
        max_head_dim: Widest head; heads are multiples of 8 wide.
        dtypes: Of q, k and v.
        library: What it needs beside PyTorch.
        built: Whether PyTorch itself was built with it.
        min_tokens: Fewest tokens.
        deterministic: Whether gradients can be deterministic.
        cpu: Whether it also runs on CPUs, for any floating dtype and shape.
    """

    run: Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
    families: tuple[str, ...] | None = None
    max_head_dim: int = 0
    dtypes: tuple[torch.dtype, ...] = HALF
    library: Library | None = None
    built: Callable[[], bool] = lambda: True
    min_tokens: int = 0
    deterministic: bool = True
    cpu: bool = False


def _has_cudnn_9() -> bool:
    return torch.backends.cudnn.is_available() and (torch.backends.cudnn.version() or 0) >= 90000


BACKENDS = {
    "fa4": Backend(
        _fa4,
        families=("sm90", "sm100"),
        max_head_dim=128,
        library=Library(
            "flash-attn-4",
            "flash_attn.cute.interface",
            {"flash_attn_func": ("softmax_scale", "return_lse"), "_flash_attn_bwd": ("softmax_scale", "deterministic")},
        ),
    ),
    "fa3": Backend(
        _fa3,
        families=("sm90",),
        max_head_dim=192,
        library=Library(
            "flash-attn 3", "flash_attn_interface", {"flash_attn_func": ("softmax_scale", "deterministic")}
        ),
    ),
    "fa2": Backend(
        _fa2,
        families=(*AMPERE_ON, "rocm"),
        max_head_dim=256,
        library=Library(
            "flash-attn", "flash_attn.flash_attn_interface", {"flash_attn_func": ("softmax_scale", "deterministic")}
        ),
    ),
    "sdpa-flash": Backend(
        partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        families=AMPERE_ON,
        max_head_dim=192,
        built=torch.backends.cuda.is_flash_attention_available,
        cpu=True,
    ),
    "sdpa-cudnn": Backend(
        partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        families=AMPERE_ON,
        max_head_dim=128,
        built=_has_cudnn_9,
        min_tokens=2,
        deterministic=False,
    ),
    "sdpa-efficient": Backend(
        partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
        families=AMPERE_ON,
        max_head_dim=256,
        dtypes=(*HALF, torch.float32),
    ),
    "math": Backend(partial(_sdpa, SDPBackend.MATH)),
    "sdpa": Backend(partial(_sdpa, None)),
}
"""Every backend by its name; ``"sdpa"`` forces nothing and runs wherever PyTorch does."""


def device_family(device: torch.device) -> str:
    """``"sm90"`` and the like for NVIDIA's GPUs by major compute capability, ``"rocm"``, else the device's type."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    if torch.version.hip:
        return "rocm"
    return f"sm{torch.cuda.get_device_capability(device)[0]}0"


def _refusal(backend: Backend, family: str, dtype: torch.dtype, deterministic: bool) -> str | None:
    if backend.families is None or (backend.cpu and family == "cpu"):
        return None
    if family not in backend.families:
        return f"runs on {', '.join(backend.families)}, not on {family}"
    if dtype not in backend.dtypes:
        return f"computes in {', '.join(map(str, backend.dtypes))}, not in {dtype}"
    if deterministic and not backend.deterministic:
        return "not deterministic, as torch.use_deterministic_algorithms asks"
    if not backend.built():
        return "not in this build of PyTorch"
    return backend.library.missing() if backend.library else None


@cache
def device_refusals(
    device: torch.device, dtype: torch.dtype, deterministic: bool
) -> tuple[str, tuple[tuple[str, str | None], ...]]:
    """Name the family of a device and, by backend, why it cannot run there in this dtype."""
    family = device_family(device)
    return family, tuple((name, _refusal(backend, family, dtype, deterministic)) for name, backend in BACKENDS.items())

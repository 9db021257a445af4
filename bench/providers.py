"""Who can compute an operator: this package's forms, PyTorch's compiler, and what a user would take instead."""

from collections.abc import Callable, Mapping
from typing import Any

import mae_kernels
import torch
import torch.nn.functional as F
from mae_kernels.attention_backends import device_refusals
from mae_kernels.windows import window_mask, window_merge, window_partition
from torch import Tensor
from torch.func import functional_call

from bench.workload import Form, Workload

Peer = Form | str
"""How a provider computes an operator, or why it cannot here."""


def find_providers(
    workload: Workload, device: torch.device, dtype: torch.dtype, compiler_modes: Mapping[str, str | None]
) -> dict[str, Peer]:
    """Find who can compute a workload.

    Args:
        workload: What to compute.
        device: Where.
        dtype: Of autocast, float32 for none.
        compiler_modes: Modes of torch.compile, by what they add to a provider's name.

    Returns:
        By provider, a function of the workload's tensors, or in a few words why it is absent.
    """
    torch.compiler.reset()  # a process compiles one function for a few sizes only
    providers: dict[str, Peer] = {}
    for name, impl in {"reference": "reference", "fused": "auto"}.items():
        form = workload.form(impl)
        providers[name] = form
        for suffix, mode in compiler_modes.items():
            providers[name + suffix] = torch.compile(form, dynamic=False, mode=mode)
    return providers | PEERS.get(workload.operator, lambda *_: {})(workload, device, dtype)


def attention_libraries(workload: Workload, device: torch.device, dtype: torch.dtype) -> dict[str, Peer]:
    """Every attention kernel that the rule can choose from."""
    _, refusals = device_refusals(device, dtype, False)

    def with_backend(name: str) -> Form:
        return lambda tensors: mae_kernels.flash_attention(**tensors, backend=name)

    return {name: refusal or with_backend(name) for name, refusal in refusals if name != "sdpa"}


def windowed_sdpa(workload: Workload, device: torch.device, dtype: torch.dtype) -> dict[str, Peer]:
    """PyTorch's attention on partitioned windows, with position bias and seam as one additive mask."""
    heads, grid, window, shift = (workload.options[name] for name in ("num_heads", "grid", "window", "shift"))
    mask = window_mask(grid, window, shift, device=device, dtype=torch.float32)

    def call(tensors: dict[str, Tensor]) -> Tensor:
        windows = window_partition(tensors["qkv"].unflatten(1, grid), window, shift)
        q, k, v = windows.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        count = windows.shape[1]
        scale = tensors["scale"].repeat(count)[:, None, None]
        bias = tensors["bias"] if mask is None else tensors["bias"] + mask[:, None]
        bias = bias.expand(count, *tensors["bias"].shape).flatten(0, 1)
        q = F.normalize(q.float(), dim=-1) * scale
        out = F.scaled_dot_product_attention(
            q.to(v.dtype), F.normalize(k.float(), dim=-1).to(v.dtype), v, attn_mask=bias.to(v.dtype)[None], scale=1.0
        )
        out = out.unflatten(1, (count, heads)).transpose(2, 3).flatten(3)
        return window_merge(out, grid, window, shift).flatten(1, 2)

    return {"sdpa": call}


def timm_block(workload: Workload, device: torch.device, dtype: torch.dtype) -> dict[str, Peer]:
    """timm's block of Swin V2-CR, with the shift of Audio-MAE."""
    try:
        from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
    except ImportError as error:
        return {"timm": f"timm does not import: {error}"}
    heads, grid, window, shift = (workload.options[name] for name in ("num_heads", "grid", "window", "shift"))
    block: Any = SwinTransformerV2CrBlock(workload.shape["width"], heads, grid, window, window).to(device)
    block.norm1.eps = block.norm2.eps = 1e-6
    block.shift_size = shift  # timm makes half a window of any
    block.register_buffer("attn_mask", block.get_attn_mask(device=device, dtype=torch.float32), persistent=False)
    network = block.attn.meta_mlp.eval()  # without its dropout, and in float32, as ours is, under autocast too
    network.forward = torch.autocast(device.type, enabled=False)(network.forward)

    def call(tensors: dict[str, Tensor]) -> Tensor:
        named = dict(tensors)
        stream, tau = named.pop("x"), named.pop("attn.tau")
        named["attn.logit_scale"] = -tau.clamp(min=0.01).log()
        return functional_call(block, named, (stream.unflatten(1, grid),)).flatten(1, 2)

    return {"timm": call}


PEERS: dict[str, Callable[[Workload, torch.device, torch.dtype], dict[str, Peer]]] = {
    "flash_attention": attention_libraries,
    "window_attention": windowed_sdpa,
    "local_block": timm_block,
}
"""Who else computes an operator."""

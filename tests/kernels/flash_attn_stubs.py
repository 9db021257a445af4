"""Stand-ins for flash-attn 2, 3 and 4: their modules, functions with their signatures, the formula inside."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

MODULES = (
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn.cute",
    "flash_attn.cute.interface",
    "flash_attn_interface",
)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output ``(B, N, heads, d)`` and log-sum-exp ``(B, heads, N)``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    lse = logits.logsumexp(dim=3)
    return torch.einsum("bhqk,bkhd->bqhd", (logits - lse[..., None]).exp(), v).contiguous(), lse


class Stubs:
    """Puts stand-ins into ``sys.modules``, hides what is installed in truth, and keeps what the functions get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch
        self.calls: list[dict] = []
        for name in MODULES:
            monkeypatch.setitem(sys.modules, name, None)

    def install(self, *backends: str) -> None:
        for backend in backends:
            getattr(self, backend.replace("-", "_"))()

    def put(self, name: str, *functions) -> None:
        """Add a module with ``functions`` in it, and the packages around it."""
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            if sys.modules[package] is None:
                module = ModuleType(package)
                module.__path__ = []
                self.monkeypatch.setitem(sys.modules, package, module)
        for function in functions:
            setattr(sys.modules[name], function.__name__, function)

    def keep(self, **arguments: object) -> None:
        if not torch.compiler.is_compiling():
            self.calls.append(arguments)

    def fa2(self) -> None:
        def flash_attn_func(
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
            return_attn_probs=False,
        ):
            self.keep(q=q, k=k, v=v, dropout_p=dropout_p, causal=causal, deterministic=deterministic)
            return attend(q, k, v, softmax_scale)[0]

        self.put("flash_attn.flash_attn_interface", flash_attn_func)

    def fa3(self, returns_lse: bool = False) -> None:
        def flash_attn_func(
            q,
            k,
            v,
            softmax_scale=None,
            causal=False,
            qv=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            window_size=(-1, -1),
            attention_chunk=0,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            sm_margin=0,
            return_attn_probs=False,
        ):
            self.keep(q=q, k=k, v=v, causal=causal, qv=qv, deterministic=deterministic)
            out, lse = attend(q, k, v, softmax_scale)
            return (out, lse) if returns_lse else out

        self.put("flash_attn_interface", flash_attn_func)

    def fa3_of_june_2025(self) -> None:
        self.fa3(returns_lse=True)

    def fa4(self) -> None:
        def flash_attn_func(
            q,
            k,
            v,
            qv=None,
            gather_kv_indices=None,
            softmax_scale=None,
            causal=False,
            window_size=(None, None),
            learnable_sink=None,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            score_mod=None,
            score_mod_bwd=None,
            mask_mod=None,
            aux_tensors=None,
            aux_scalars=None,
            block_sparse_tensors=None,
            block_sparse_tensors_bwd=None,
            return_lse=False,
        ):
            self.keep(q=q, k=k, v=v, qv=qv, causal=causal)
            out, lse = attend(q, k, v, softmax_scale)
            return out, lse.float() if return_lse else None

        def _flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            softmax_scale=None,
            causal=False,
            softcap=0.0,
            window_size_left=None,
            window_size_right=None,
            m_block_size=64,
            n_block_size=128,
            num_threads=256,
            pack_gqa=False,
            num_stages_Q=2,
            num_stages_dO=2,
            SdP_swapAB=False,
            dKV_swapAB=False,
            dQ_swapAB=False,
            AtomLayoutMSdP=2,
            AtomLayoutNdKV=2,
            AtomLayoutMdQ=2,
            V_in_regs=False,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            seqused_q=None,
            seqused_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            deterministic=False,
            dq=None,
            dk=None,
            dv=None,
            score_mod=None,
            score_mod_bwd=None,
            mask_mod=None,
            aux_tensors=None,
            aux_scalars=None,
            block_sparse_tensors=None,
            dlse=None,
            learnable_sink=None,
        ):
            self.keep(dout=dout, causal=causal, deterministic=deterministic)
            scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
            weights = (scale * torch.einsum("bqhd,bkhd->bhqk", q, k) - lse[..., None]).exp().to(q.dtype)
            d_weights = torch.einsum("bqhd,bkhd->bhqk", dout, v)
            d_logits = scale * weights * (d_weights - (dout * out).sum(dim=3).transpose(1, 2)[..., None])
            dq = torch.empty_like(q).copy_(torch.einsum("bhqk,bkhd->bqhd", d_logits, k))
            dk = torch.empty_like(k).copy_(torch.einsum("bhqk,bqhd->bkhd", d_logits, q))
            dv = torch.empty_like(v).copy_(torch.einsum("bhqk,bqhd->bkhd", weights, dout))
            return dq, dk, dv

        self.put("flash_attn.cute.interface", flash_attn_func, _flash_attn_bwd)

    def cute_of_flash_attn_2_8(self) -> None:
        def flash_attn_func(
            q,
            k,
            v,
            softmax_scale=None,
            causal=False,
            window_size=(None, None),
            learnable_sink=None,
            softcap=0.0,
            pack_gqa=None,
        ):
            raise AssertionError("called")

        self.put("flash_attn.cute.interface", flash_attn_func)

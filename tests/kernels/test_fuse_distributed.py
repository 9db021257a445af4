"""Fused models under DDP and FSDP2, on two processes: the same loss and gradients as the unfused model on one."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from mae_kernels import fuse, unfuse
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

RANKS = 2


def build() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3
    ).double()


def batch() -> Tensor:
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def wrap_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def wrap_fsdp(model: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": wrap_ddp, "fsdp2": wrap_fsdp}


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def work(rank: int, wrap: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = compute(rank, wrap)
    gc.collect()  # as long as a model has the group, gloo's threads go on, and may abort the process while it exits
    dist.destroy_process_group()
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def compute(rank: int, wrap: str) -> dict[str, Any]:
    model = build()
    assert len(fuse(model, impl="torch").replaced) >= 2
    wrapped = WRAPS[wrap](model)
    loss = wrapped(batch().chunk(RANKS)[rank]).square().mean()
    loss.backward()
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return {"gradients": gradients, "left": len(unfuse(model).left)}


@pytest.mark.parametrize("wrap", WRAPS)
def test_gradients_are_those_of_one_process(tmp_path: Path, wrap: str) -> None:
    torch.multiprocessing.start_processes(work, (wrap, str(tmp_path)), nprocs=RANKS, start_method="spawn")
    found = torch.load(tmp_path / "found.pt")
    model = build()
    model(batch()).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-9, atol=1e-12)
    # FSDP2 gives the modules that it shards classes of its own: those cannot be undone.
    assert found["left"] == (2 if wrap == "fsdp2" else 0)

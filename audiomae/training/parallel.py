"""How ranks share a model: each has a copy (DDP), or a shard of every parameter (FSDP2)."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from audiomae.training.blocks import blocks_of, checkpoint_blocks, compile_blocks
from audiomae.training.config import RunConfig
from audiomae.training.distributed import Ranks

# Buffers are constant. PyTorch 2.13 gave the setting that sends them in every forward a new name.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def distribute(model: nn.Module, config: RunConfig, ranks: Ranks) -> nn.Module:
    """Make what a training step calls in the place of a model, which keeps its names and becomes part of it.

    Args:
        model: On ``ranks.device``, with its weights. Sharding makes new parameters of it, so that its optimiser must be
            made afterwards.
        config: The run.
        ranks: This process among the others, which all do the same.
    """
    if config.checkpoint_activations:
        checkpoint_blocks(model)
    if config.compile:
        compile_blocks(model)
    if ranks.world_size == 1:
        return model
    reduce_dtype = torch.bfloat16 if config.reduce_dtype == "bf16" else torch.float32
    if config.parallel == "fsdp":
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        # A block computes the norm that opens the next one, so norms, which are small, are gathered with the model.
        for block in blocks_of(model):
            fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model
    options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
    replica = DistributedDataParallel(model, **options)
    if reduce_dtype == torch.bfloat16:
        replica.register_comm_hook(None, bf16_compress_hook)
    return replica


@contextmanager
def syncing(replica: nn.Module, syncs: bool) -> Iterator[None]:
    """Average gradients over the ranks in the backward of what is computed inside, or add them up until it is done."""
    if isinstance(replica, FSDPModule):
        replica.set_requires_gradient_sync(syncs)
    if isinstance(replica, DistributedDataParallel) and not syncs:
        with replica.no_sync():
            yield
    else:
        yield


def whole(value: Any, *, keep: bool) -> Any:
    """A value with every shard in it whole and on the CPU; all ranks take part.

    Args:
        value: A tensor, a plain value, or dictionaries and lists of them.
        keep: Whether this rank wants it; where not, whole tensors are None, lest each rank of a machine hold them all.
    """
    if isinstance(value, dict):
        return {name: whole(inner, keep=keep) for name, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner, keep=keep) for inner in value]
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None
    return value


def sharded(value: Tensor, like: Tensor) -> Tensor:
    """The shard of a whole tensor that this rank has of another one of the same shape, or all of it."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # Every rank has the whole, so that none need send it.
    moved = value.to(like.to_local().device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)

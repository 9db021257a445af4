"""The processes of a run: who they are, where they compute, and how they agree."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from audiomae.training.config import JoinError, SetupError
from audiomae.training.store import open_store


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        local_world_size: Of those, on this machine.
        device: Where this process computes.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def send(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from the CPU to the device without waiting for it."""
        if self.device.type == "cuda":  # a copy from pageable memory would wait
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def broadcast(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers that the main one has."""
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """Collect a picklable value of every rank, in the order of ranks, on all of them."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def is_main_process() -> bool:
    """Whether this process speaks for all of them; known before they are joined."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def join_ranks(device: str, patience: float = 1800.0) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or run as the only one.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``. Ranks talk through NCCL on GPUs and gloo on CPUs.
        patience: Seconds that they wait for each other before PyTorch gives up.

    Raises:
        SetupError: ``"cuda"`` without a GPU, fewer GPUs than processes on this machine, or ranks that do not come.
    """
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    gpus = torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise SetupError("device is cuda, but PyTorch sees no GPU here")
    on_gpu = gpus > 0 and device != "cpu"
    if on_gpu and local_world_size > gpus:  # asked of all, so that every rank gives up
        raise SetupError(f"{local_world_size} processes on this machine, but it has {gpus} GPUs: start one for each")
    chosen = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if world_size > 1:
        try:
            store = open_store(rank, world_size)
        except TimeoutError as error:
            raise JoinError(str(error)) from error
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=patience),
            device_id=chosen if on_gpu else None,
        )
    yield Ranks(rank, world_size, local_world_size, chosen)
    if world_size > 1:  # not after an error: the others may wait in a collective, and this would wait for them
        # As long as a model has the group, gloo's threads go on, and may abort the process while it exits.
        gc.collect()
        dist.destroy_process_group()

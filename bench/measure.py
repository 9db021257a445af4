"""What a benchmark measures besides time: memory and saved tensors."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def saved_tensor_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that autograd keeps between forward and backward.

    Args:
        forward: Computes a loss.
        module: Its parameters and buffers exist anyway and do not count.

    Returns:
        Sum of the sizes of the distinct storages that are saved, each counted once however many views of it are saved.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(saved.values())
    del loss  # until here it keeps every saved storage alive, so that no address is used twice
    return total


def peak_memory_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Highest memory in use while ``call`` runs: of the device, or of this process on a CPU (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    # Writing 5 resets the high-water mark of the resident set (man 5 proc).
    Path("/proc/self/clear_refs").write_text("5")
    call()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].removesuffix("kB")) * 1024

"""What benchmarks measure: time, memory, saved tensors."""

import statistics
import time
from collections.abc import Callable, Sequence
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


def time_quantiles(
    call: Callable[[], object], device: torch.device, *, clear: Sequence[Tensor] = (), budget_ms: float = 200
) -> tuple[float, float, float]:
    """Time a call that has run before.

    Args:
        call: What to time.
        device: Where it runs. A GPU is timed by its own events, with a cold L2 cache at every call.
        clear: Tensors whose gradients are dropped before every call.
        budget_ms: About how long to go on, in milliseconds.

    Returns:
        20th, 50th and 80th percentile in milliseconds.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        p20, p50, p80 = do_bench(
            call, warmup=25, rep=budget_ms, grad_to_none=list(clear) or None, quantiles=[0.2, 0.5, 0.8]
        )
        return p20, p50, p80
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget_ms:
        for tensor in clear:
            tensor.grad = None
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    p20, *_, p80 = statistics.quantiles(times, n=5)
    return p20, statistics.median(times), p80

"""What benchmarks measure besides time: memory, saved tensors, and what the device itself reaches."""

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from bench.precision import name_of
from bench.rows import Row
from bench.turns import Laps, Mark

MIB = 2**20


def saved_tensor_bytes(forward: Callable[[], object], existing: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward.

    Args:
        forward: Computes something with a graph, and returns it.
        existing: Tensors that exist anyway and do not count: arguments, parameters, buffers.

    Returns:
        Sum of the sizes of the distinct storages that are saved, each counted once however many views of it are saved.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in existing}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(saved.values())
    del result  # until here it keeps every saved storage alive, so that no address is used twice
    return total


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of PyTorch's allocator in use while ``call`` runs, above what was before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@cache
def _measure_ceilings(device: torch.device, dtype: torch.dtype, threads: int) -> tuple[float, float]:
    large = device.type == "cuda"
    source = torch.zeros((2**30 if large else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    laps = Laps(device, kernels=True)

    def least_s(call: Callable[[], object]) -> float:
        def timed(turn: int, mark: Mark) -> None:
            call()

        return min(laps.time(timed, turn)["all"] for turn in range(9)) / 1e3

    return 2 * source.nbytes / least_s(lambda: target.copy_(source)), 2 * side**3 / least_s(lambda: a @ b)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second that a copy reads and writes, and FLOPs a second of a square matrix product, at their best.

    Measured once a process for each dtype and number of threads.
    """
    return _measure_ceilings(device, dtype, torch.get_num_threads())


def ceiling_rows(device: torch.device, dtype: torch.dtype, about: dict[str, object]) -> list[Row]:
    """Both ceilings as rows."""
    copied, multiplied = measure_ceilings(device, dtype)
    copy, product = {"GB/s": copied / 1e9}, {"TFLOP/s": multiplied / 1e12}
    return [
        Row("ceilings", "copy", "torch", "torch", facts=copy, about=about),
        Row("ceilings", "matrix product", "torch", "torch", dtype=name_of(dtype), facts=product, about=about),
    ]

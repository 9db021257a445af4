"""Compile the Triton kernels for GPUs that need not be there, and read what came out.

    python -m bench.compiled                      # prints the table and writes bench/results/compiled.{json,md}
    python -m bench.compiled --out DIR --operators window_attention mlp --targets sm_90

Every operator runs forward and backward on tensors without storage, at the sizes of ViT-B and batch 512, in bfloat16
under autocast and in float32; whatever its launchers launch is compiled, with the configuration and the argument
specialisation of a real launch, and not run. sm_80 and sm_90 are read: registers, spills and shared memory as ptxas
tells them, the widths of global loads and stores and the tensor-core instructions from the PTX. Other targets must
compile. TRITON_INTERPRET must not be set.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.operators import WORKLOADS, Workloads
from bench.precision import name_of
from bench.provenance import provenance

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
READ = ("sm_80", "sm_90")
"""Targets whose code is read."""

TENSOR_CORE = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
REGISTERS, SHARED_BYTES, WARPS = 65536, {"sm_80": 163 * 1024, "sm_90": 227 * 1024}, 64
"""What a multiprocessor has."""


@dataclass(frozen=True)
class Compiled:
    """What a kernel became.

    Attributes:
        operator: Whose kernel.
        kernel: Its name.
        precision: ``"bfloat16"`` under autocast, or ``"float32"``.
        target: As in ``TARGETS``.
        programs: Of the launch.
        warps: Of a program.
        registers: Of a thread; None where the code is not read, as all below.
        spill_bytes: Stored to and loaded from local memory by a thread.
        shared_bytes: Of a program.
        resident_warps: That fit a multiprocessor at once, of 64.
        load_bits: Count of global loads by width.
        store_bits: Count of global stores by width.
        tensor_core: Count of tensor-core instructions by kind.
    """

    operator: str
    kernel: str
    precision: str
    target: str
    programs: int
    warps: int
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    resident_warps: int | None = None
    load_bits: dict[int, int] | None = None
    store_bits: dict[int, int] | None = None
    tensor_core: dict[str, int] | None = None


@dataclass(frozen=True)
class Offline:
    """A driver for Triton that knows its target and has no device."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> GPUTarget:
        """Kernels are cached by device: a device for each target."""
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        """No stream."""
        return 0


class LaunchOnMeta(TorchDispatchMode):
    """Sends registered operators on tensors without storage to their launchers, not to what they look like."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``."""
        if func.namespace == "mae_kernels":
            from mae_kernels.kernels._registration import LAUNCHERS

            return LAUNCHERS[func._schema.name.removeprefix("mae_kernels::")](*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def compile_launches(target: GPUTarget) -> Iterator[list[tuple[str, int, Any]]]:
    """Compile each launch for ``target`` instead of running it; yields (kernel, programs, compiled) as they come."""
    launches: list[tuple[str, int, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Sequence[int], warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.__name__, torch.Size(grid).numel(), compiled))
        return compiled

    driver.set_active(Offline(target))
    with mock.patch.object(JITFunction, "run", compile_only), LaunchOnMeta():
        yield launches


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast of GPUs to ``dtype``, off for float32; ``torch.autocast`` itself switches it off where none is there."""
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    yield
    torch.set_autocast_enabled("cuda", False)


def read_ptx(ptx: str, target: str) -> dict[str, Any]:
    """Registers, spills, widths and tensor-core instructions of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    if architecture is None:
        raise ValueError(f"PTX without a target: {ptx[:200]!r}")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), "-v", f"--gpu-name={architecture[1]}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill", report)
    registers = re.search(r"Used (\d+) registers", report)
    if registers is None or len(spills) < 2:
        raise ValueError(f"ptxas reported {report!r}, expected registers and spills")
    return {
        "registers": int(registers[1]),
        "spill_bytes": sum(map(int, spills)),
        "load_bits": _widths("ld", ptx),  # with those that go straight to shared memory
        "store_bits": _widths("st", ptx),
        "tensor_core": {name: ptx.count(name) for name in TENSOR_CORE if name in ptx},
    }


def _widths(instruction: str, ptx: str) -> dict[int, int]:
    """Count of global accesses by bits."""
    found = re.findall(rf"\b{instruction}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    widths = [int(lanes or 1) * int(bits) for lanes, bits in found]
    if instruction == "ld":
        widths += [8 * int(size, 16) for size in re.findall(r"\bcp\.async\.c\w\.shared\.global.*?, (0x\w+)", ptx)]
    return dict(sorted(Counter(widths).items(), reverse=True))


def resident_warps(target: str, registers: int, shared_bytes: int, warps: int) -> int:
    """Warps of a kernel that a multiprocessor holds at once."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)  # handed out by 8 a thread
    by_shared = SHARED_BYTES[target] // (shared_bytes + 1024)  # 1 KiB a block is the system's
    return min(by_registers, by_shared, WARPS // warps) * warps


def compile_operator(operator: str, precision: torch.dtype, target: str, batch: int = 512) -> list[Compiled]:
    """Compile what forward and backward of an operator launch at the sizes of ViT-B."""
    with compile_launches(TARGETS[target]) as launches, autocast(precision):
        workload = WORKLOADS[operator](Workloads(batch, "meta", precision))
        outputs = workload(impl="triton")
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        trained = [output for output in outputs if output.requires_grad]
        if trained:
            torch.autograd.backward(trained, [torch.empty_like(output) for output in trained])
    rows = []
    for kernel, programs, compiled in launches:
        facts: dict[str, Any] = {}
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        if target in READ:
            facts = read_ptx(compiled.asm["ptx"], target)
            facts |= {"shared_bytes": shared}
            facts |= {"resident_warps": resident_warps(target, facts["registers"], shared, warps)}
        name = name_of(precision)
        rows.append(Compiled(operator, kernel.strip("_"), name, target, programs, warps, **facts))
    return rows


def table(rows: Sequence[Compiled]) -> str:
    """Markdown table of the targets that are read."""

    def count(values: dict[Any, int] | None) -> str:
        return ", ".join(f"{times} x {what}" for what, times in (values or {}).items()) or "-"

    head = (
        "operator", "kernel", "precision", "target", "programs", "warps", "registers", "spilled bytes", "shared bytes",
        "resident warps", "loads x bits", "stores x bits", "tensor core",
    )  # fmt: skip
    lines = [head, tuple("---" for _ in head)]
    for row in rows:
        if row.registers is not None:
            facts = asdict(row).values()
            lines.append(tuple(count(fact) if isinstance(fact, dict) else str(fact) for fact in facts))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m bench.compiled", description="Compile the kernels and read them.")
    fused = [operator for operator in WORKLOADS if operator not in ("flash_attention", "local_block")]
    parser.add_argument("--operators", nargs="+", choices=fused, default=fused)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--out", type=Path, help="folder for compiled.json and compiled.md", default=RESULTS)
    options = parser.parse_args()
    if knobs.runtime.interpret:
        sys.exit("bench.compiled: TRITON_INTERPRET is set, expected it unset: interpreted kernels are not compiled")
    rows = [
        row
        for operator in options.operators
        for precision in (torch.bfloat16, torch.float32)
        for target in options.targets
        for row in compile_operator(operator, precision, target)
    ]
    facts = provenance(torch.device("cpu"))
    about = {name: facts[name] for name in ("torch", "commit", "date")} | {"triton": triton.__version__}
    compiled_only = sorted({row.target for row in rows if row.registers is None})
    text = (
        "# What the kernels compile to\n\n"
        "`python -m bench.compiled`: ViT-B, batch 512, at the launchers' own configurations; "
        f"{', '.join(f'{name} {value}' for name, value in about.items())}.\n"
        + (f"Also compiled, and not read: {', '.join(compiled_only)}.\n" if compiled_only else "")
        + f"\n{table(rows)}\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compiled.md").write_text(text)
    (options.out / "compiled.json").write_text(
        json.dumps(about | {"kernels": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()

"""Whether a form of an operator is right: what must hold before its time is worth a line."""

import torch
from torch import Tensor

from bench.operators import WORKLOADS, Workload, Workloads

# What a form may be off by, besides twice what the reference is in the same dtype: a rounding of the largest value.
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def run(workload: Workload, impl: str, dtype: torch.dtype, exact: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients of a workload, for upstream gradients that are the same at every call.

    Args:
        workload: What to run, under autocast to ``dtype`` unless that is float32.
        impl: Form of the operator.
        dtype: Precision.
        exact: Run in float64, without autocast, on the values that ``workload`` has.
    """
    device = next(iter(workload.tensors.values())).device
    leaves = {
        name: (t.double() if exact and t.is_floating_point() else t).detach().requires_grad_(t.requires_grad)
        for name, t in workload.tensors.items()
    }
    call = Workload(workload.operator, leaves, workload.options, workload.forward)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not exact):
        outputs = call(impl)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    trained = [output for output in outputs if output.requires_grad]
    if trained:
        generator = torch.Generator(device).manual_seed(1)
        upstream = [torch.randn(o.shape, device=device, generator=generator).to(dtype).to(o.dtype) for o in trained]
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        gradients = torch.autograd.grad(trained, [leaves[name] for name in names], upstream)
        results |= {f"gradient of {name}": grad for name, grad in zip(names, gradients, strict=True)}
    return results


def find_errors(operator: str, impl: str, device: str, dtype: torch.dtype, batch: int = 8) -> list[str]:
    """Compare a form with the reference in float64, at the sizes of ViT-B.

    Returns:
        A line for each output or gradient that is off by more than twice the reference's own error in ``dtype`` and a
        rounding.
    """
    workload = WORKLOADS[operator](Workloads(batch, device, dtype))
    actual, plain = run(workload, impl, dtype), run(workload, "reference", dtype)
    lines = []
    for what, truth in run(workload, "reference", dtype, exact=True).items():
        error, allowed = ((x[what].double() - truth.double()).abs().max().item() for x in (actual, plain))
        bound = 2 * allowed + ROUNDING[dtype] * truth.double().abs().max().item()
        if not error <= bound:
            lines.append(f"{operator}, {impl}, {dtype}: {what} is off by {error:.2e}, expected at most {bound:.2e}")
    return lines

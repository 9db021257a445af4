"""Whether a provider of an operator is right: what must hold before its time is worth a line."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.workload import Form, Workload

# What a provider may be off by, besides twice what the reference is in the same dtype: a rounding of the largest value.
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}
_EPSILON = 2**-24  # of float32, in which sums are taken; n terms in sequence lose about sqrt(n) of it


def results(workload: Workload, form: Form, dtype: torch.dtype, *, exact: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients of a workload, for upstream gradients that are the same at every call.

    Args:
        workload: What to run.
        form: Computes it, under autocast to ``dtype`` unless that is float32.
        dtype: Precision.
        exact: Run in float64, without autocast, on the values that ``workload`` has.
    """
    device = next(iter(workload.tensors.values())).device
    leaves = {
        name: (t.double() if exact and t.is_floating_point() else t).detach().requires_grad_(t.requires_grad)
        for name, t in workload.tensors.items()
    }
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not exact):
        outputs = form(leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    trained = [output for output in outputs if output.requires_grad]
    if trained:
        generator = torch.Generator(device).manual_seed(1)
        upstream = [torch.randn(o.shape, device=device, generator=generator).to(dtype).to(o.dtype) for o in trained]
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        gradients = torch.autograd.grad(trained, [leaves[name] for name in names], upstream)
        found |= {f"gradient of {name}": grad for name, grad in zip(names, gradients, strict=True)}
    return found


def attempt(check: Callable[[], str | None]) -> str | None:
    """Run a check of a provider; one that raises is wrong, and must not cost the others their results."""
    try:
        return check()
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Judge:
    """Says whether a provider is right on a workload.

    Args:
        workload: What to compute.
        dtype: Precision.

    Attributes:
        error: Of the last provider: the largest distance from float64, over the largest value of what it is in.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype):
        self.workload, self.dtype = workload, dtype
        exact = results(workload, workload.form("reference", exact=True), dtype, exact=True)
        plain = results(workload, workload.form("reference"), dtype)
        self.truth = exact
        rounding = max(ROUNDING[dtype], _EPSILON * workload.summed**0.5)
        self.bounds = {
            what: 2 * _distance(plain[what], truth) + rounding * self._largest(what) for what, truth in exact.items()
        }
        self.error = 0.0

    def find_error(self, form: Form) -> str | None:
        """Compare a provider with the reference in float64, and keep the largest relative error in ``error``.

        Returns:
            The output or gradient that is off by more than twice the reference's own error in the precision and a
            rounding, or None.
        """
        actual = results(self.workload, form, self.dtype)
        errors = {what: _distance(actual[what], truth) for what, truth in self.truth.items()}
        self.error = max(error / max(self._largest(what), _EPSILON) for what, error in errors.items())
        for what, error in errors.items():
            if not error <= self.bounds[what]:
                return f"{what} is off by {error:.2e}, expected at most {self.bounds[what]:.2e}"
        return None

    def _largest(self, what: str) -> float:
        return self.truth[what].double().abs().max().item()


def _distance(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth.double()).abs().max().item()

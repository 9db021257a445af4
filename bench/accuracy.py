"""Whether a provider of an operator is right: what must hold before its time is worth a line."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.precision import autocast
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
    with autocast(device, torch.float64 if exact else dtype):
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
    """Says whether results are right: none off by more than twice the reference's own error, and a rounding.

    Args:
        truth: Results in float64, by name.
        plain: Those of the reference in ``dtype``.
        dtype: Precision.
        summed: Rows that the gradient of a parameter sums over.
        whole: Measure a result as a vector, by its norm, and not by its largest value.

    Attributes:
        error: Of what was judged last: the largest distance from the truth, over the size of that.
    """

    def __init__(
        self,
        truth: Mapping[str, Tensor],
        plain: Mapping[str, Tensor],
        dtype: torch.dtype,
        *,
        summed: int = 0,
        whole: bool = False,
    ):
        self.truth, self._whole = truth, whole
        self.error = 0.0
        self._sizes = {what: self._size(exact) for what, exact in truth.items()}
        rounding = max(ROUNDING[dtype], _EPSILON * summed**0.5)
        self._bounds = {
            what: 2 * distance + rounding * self._sizes[what] for what, distance in self._distances(plain).items()
        }

    def find_error(self, actual: Mapping[str, Tensor]) -> str | None:
        """Name the result that is off by too much, or None."""
        distances = self._distances(actual)
        self.error = max(distance / max(self._sizes[what], _EPSILON) for what, distance in distances.items())
        for what, distance in distances.items():
            if not distance <= self._bounds[what]:
                return f"{what} is off by {distance:.2e}, expected at most {self._bounds[what]:.2e}"
        return None

    def _distances(self, actual: Mapping[str, Tensor]) -> dict[str, float]:
        return {what: self._size(actual[what].double() - exact.double()) for what, exact in self.truth.items()}

    def _size(self, x: Tensor) -> float:
        return (x.double().norm() if self._whole else x.double().abs().max()).item()


def judge_workload(workload: Workload, dtype: torch.dtype) -> Judge:
    """Make the judge of a workload's outputs and gradients."""
    truth = results(workload, workload.form("reference", exact=True), dtype, exact=True)
    return Judge(truth, results(workload, workload.form("reference"), dtype), dtype, summed=workload.summed)

"""What tests of fused modules share: a module as a function of its state, and how it is compared with a fused copy."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mae_kernels.patching.core import Report, Target, fuse_targets
from torch import Tensor, nn
from torch.func import functional_call

from .calls import KERNEL_DEVICE
from .tolerance import RELATIVE_ERROR, with_gradients

TORCH_FORMS = ["reference", "torch"]


def draw_state(module: nn.Module, x: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """An input and a whole state, float64, the state a little off that of the module."""
    generator = torch.Generator().manual_seed(seed)

    def near(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.double() + 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)

    state = {name: near(value) for name, value in module.state_dict().items()}
    return state | {"x": torch.randn(x, generator=generator, dtype=torch.float64)}


def function_of(module: nn.Module, *arguments: Any, seed: int = 0, **options: Any) -> Callable[..., Tensor]:
    """A module as a function of its state and its input; what it draws at random starts from a seed."""

    def call(x: Tensor, **state: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return functional_call(module, state, (x, *arguments), options)

    return call


def fused_copy(module: nn.Module, targets: Sequence[Target], impl: str) -> nn.Module:
    """A copy that is fused, of which nothing was left as it is."""
    fused = copy.deepcopy(module)
    report = fuse_targets(fused, targets, impl)
    assert report.replaced
    assert not report.left, str(report)
    return fused


def assert_as_accurate(
    fused: nn.Module,
    plain: nn.Module,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    autocast: bool = False,
    draws: int = 3,
) -> None:
    """Hold a fused module to twice the error of the plain one in the same dtype, and some roundings.

    Output, and gradients of input and state. So many roundings lie behind each value that the largest error is chance:
    errors are norms, over all values of some random upstream gradients.

    Args:
        fused: What is tested.
        plain: What it was.
        tensors: As :func:`draw_state` gives them.
        dtype: Of all tensors, or with ``autocast`` that of autocast over float32.
        autocast: Whether autocast is on.
        draws: Of upstream gradients.
    """
    given = torch.float32 if autocast else dtype
    rounded = {name: t.to(given) if t.is_floating_point() else t for name, t in tensors.items()}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in rounded.items()}
    squares: dict[str, Tensor] = {}
    for seed in range(draws):
        with torch.autocast(KERNEL_DEVICE, dtype, enabled=autocast):
            results, published = (with_gradients(function_of(module), rounded, seed) for module in (fused, plain))
        truths = with_gradients(function_of(plain), exact, seed, rounding=published["output 0"].dtype)
        for what, truth in truths.items():
            actual, stock = results[what], published[what]
            assert (actual.shape, actual.dtype) == (stock.shape, stock.dtype), what
            of_draw = torch.stack(
                [(value - truth).square().sum() for value in (actual, stock, torch.zeros_like(truth))]
            )
            squares[what] = squares.get(what, 0) + of_draw
    for what, of_draws in squares.items():
        error, allowed, size = of_draws.sqrt().tolist()
        bound = 2 * allowed + RELATIVE_ERROR[dtype] * size
        assert error <= bound, f"{what} in {dtype} is off by {error:.2e}, PyTorch by {allowed:.2e}: over {bound:.2e}"


def on_device(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(KERNEL_DEVICE) for name, tensor in tensors.items()}


def paths(report: Report) -> dict[str, str]:
    return {change.path: change.what for change in report.replaced}


def reasons(report: Report) -> dict[str, str]:
    return {change.path: change.what for change in report.left}


class Adapter(nn.Module):
    """A linear layer with a trained addition of low rank, as LoRA has it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 1, bias=False)
        self.up = nn.Linear(1, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))

"""Blocks of timm's Swin, V1, V2 and V2-CR, to fuse and to compare."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from mae_kernels.patching import swin_timm, vit
from mae_kernels.patching.core import Report, fuse_targets
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor, nn

from .tolerance import RELATIVE_ERROR

CLASSES = {"v1": SwinTransformerBlock, "v2": SwinTransformerV2Block, "v2-cr": SwinTransformerV2CrBlock}
SIZE = {"v1": "input_resolution", "v2": "input_resolution", "v2-cr": "feat_size"}
KINDS = list(CLASSES)

# kind, grid, arguments
CASES: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "v1": ("v1", (8, 4), {"window_size": 4}),
    "v1-shifted": ("v1", (8, 12), {"window_size": 4, "shift_size": 2}),
    "v1-shifted-along-one-axis": ("v1", (8, 4), {"window_size": 4, "shift_size": (2, 2)}),
    "v1-rectangular-windows": ("v1", (6, 8), {"window_size": (3, 2), "shift_size": (2, 1)}),
    "v1-window-past-an-axis": ("v1", (3, 8), {"window_size": 4, "shift_size": 2}),
    "v1-always-shifted": ("v1", (4, 4), {"window_size": 4, "shift_size": 2, "always_partition": True}),
    "v1-padded": ("v1", (7, 9), {"window_size": 4}),
    "v1-padded-and-shifted": ("v1", (7, 9), {"window_size": 4, "shift_size": (2, 1)}),
    "v1-padded-grid-in-a-window": ("v1", (3, 5), {"window_size": 4, "shift_size": 2, "always_partition": True}),
    "v1-mask-of-the-call": ("v1", (8, 8), {"window_size": 4, "shift_size": 2, "dynamic_mask": True}),
    "v1-wide-heads-without-bias": ("v1", (4, 6), {"window_size": 2, "head_dim": 5, "qkv_bias": False}),
    "v1-another-gelu": ("v1", (4, 6), {"window_size": 2, "act_layer": lambda: nn.GELU("tanh")}),
    "v2": ("v2", (8, 4), {"window_size": 4, "pretrained_window_size": (6, 3)}),
    "v2-shifted": ("v2", (8, 12), {"window_size": 4, "shift_size": 2}),
    "v2-rectangular-windows": ("v2", (6, 8), {"window_size": (3, 2), "shift_size": (2, 1)}),
    "v2-window-past-an-axis": ("v2", (3, 8), {"window_size": 4, "shift_size": 2, "qkv_bias": False}),
    "v2-padded-and-shifted": ("v2", (7, 9), {"window_size": 4, "shift_size": (2, 1)}),
    "v2-mask-of-the-call": ("v2", (8, 8), {"window_size": 4, "shift_size": 2, "dynamic_mask": True}),
    "v2-cr": ("v2-cr", (8, 4), {"window_size": (4, 4), "extra_norm": True}),
    "v2-cr-shifted": ("v2-cr", (8, 12), {"window_size": (4, 4), "shift_size": (2, 2)}),
    "v2-cr-rectangular-windows": ("v2-cr", (6, 8), {"window_size": (3, 2), "shift_size": (1, 1)}),
    "v2-cr-window-past-an-axis": ("v2-cr", (3, 8), {"window_size": (4, 4), "shift_size": (2, 2)}),
    "v2-cr-padded-and-shifted": ("v2-cr", (7, 9), {"window_size": (4, 4), "shift_size": (2, 2)}),
    "v2-cr-mask-of-the-call": ("v2-cr", (8, 8), {"window_size": (4, 4), "shift_size": (2, 2), "dynamic_mask": True}),
}
SHIFTED = {"window_size": (2, 2), "shift_size": (1, 1)}
WIDTH = 12


def spread(model: nn.Module) -> nn.Module:
    """Move the parameters from where the initialisation leaves them: norms at 0, scales all the same, biases at 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def past_the_clamp(model: nn.Module) -> nn.Module:
    """Put a head's scale where timm clamps it; there, bfloat16 is a coarse measure."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.view(-1)[0] = 5
    return model


def make(kind: str, grid: tuple[int, int], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return spread(CLASSES[kind](WIDTH, **{SIZE[kind]: grid, "num_heads": 3} | options))


def fuse(model: nn.Module, impl: str = "torch") -> Report:
    return fuse_targets(model, (*swin_timm.TARGETS, *vit.TARGETS), impl)


def fused_copy(model: nn.Module, impl: str = "torch") -> Any:
    fused = copy.deepcopy(model)
    report = fuse(fused, impl)
    blocks = [change for change in report.replaced if "Swin" in change.name]
    assert len(blocks) == sum(isinstance(module, tuple(CLASSES.values())) for module in model.modules()), report
    return fused


def tokens(grid: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, *grid, WIDTH, generator=torch.Generator().manual_seed(2))


def results(model: Callable[[Tensor], Tensor], x: Tensor, autocast: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Output, all gradients for a random upstream gradient, and the next number of the generator."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = model(x)
    following = torch.rand(())
    generator = torch.Generator().manual_seed(seed)
    # Rounded, so that models in different dtypes are given the same.
    upstream = torch.randn(out.shape, generator=generator).bfloat16().to(out)
    inputs = {"x": x} | (dict(model.named_parameters()) if isinstance(model, nn.Module) else {})
    gradients = torch.autograd.grad(out, list(inputs.values()), upstream, allow_unused=True, materialize_grads=True)
    found = {"output": out.detach(), "following number": following}
    return found | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


def assert_as_accurate(fused: nn.Module, plain: nn.Module, x: Tensor, dtype: torch.dtype, draws: int = 3) -> None:
    """Hold a model to twice the plain one's error and some roundings: in float32, or in bfloat16 by autocast.

    As :func:`tests.kernels.fusing.assert_as_accurate`, for modules with buffers that have a dtype and no place in the
    state.
    """
    autocast, exact = dtype == torch.bfloat16, copy.deepcopy(plain).double()
    squares: dict[str, Tensor] = {}
    for seed in range(draws):
        actual, published = results(fused, x, autocast, seed), results(plain, x, autocast, seed)
        for what, truth in results(exact, x.double(), seed=seed).items():
            assert (actual[what].shape, actual[what].dtype) == (published[what].shape, published[what].dtype), what
            values = (actual[what] - truth, published[what] - truth, truth)
            of_draw = torch.stack([value.double().square().sum() for value in values])
            squares[what] = squares.get(what, torch.zeros_like(of_draw)) + of_draw
    for what, of_draws in squares.items():
        error, allowed, size = of_draws.sqrt().tolist()
        if what.endswith("meta_mlp.fc2.bias"):  # added to all logits of a head, which changes nothing
            size = squares[what.replace("bias", "weight")][2].sqrt().item()
        bound = 2 * allowed + RELATIVE_ERROR[dtype] * size
        assert error <= bound, f"{what} in {dtype} is off by {error:.2e}, timm by {allowed:.2e}: over {bound:.2e}"


def assert_same(fused: nn.Module, plain: nn.Module, x: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(results(fused, x), results(plain, x), **({"rtol": 1e-9, "atol": 1e-9} | tolerance))

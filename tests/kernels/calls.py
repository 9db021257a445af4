"""One small call of every operator, for what holds for all of them, and the forms that tests can ask for."""

from dataclasses import dataclass, field, replace
from typing import Any

import mae_kernels
import torch
from mae_kernels.ops import OPERATORS
from torch import Tensor


@dataclass(frozen=True)
class Call:
    operator: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **changes: Any) -> Any:
        return getattr(mae_kernels, self.operator)(**self.tensors | self.options | changes)

    def to(self, dtype: torch.dtype) -> "Call":
        return replace(self, tensors={n: t.to(dtype) if t.is_floating_point() else t for n, t in self.tensors.items()})

    def on(self, device: str) -> "Call":
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton's kernels run: compiled on a GPU, otherwise interpreted."""

KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
"""What Triton's kernels compute in."""


def torch_forms(operator: str) -> list[str]:
    """The forms that run on CPU tensors of any dtype."""
    return [form for form in OPERATORS[operator].FORMS if form != "triton"]


def shuffled_rows(batch: int, length: int, seed: int = 0) -> Tensor:
    """A permutation of ``length`` ids in each of ``batch`` rows, int64."""
    noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(dim=1)


def _small_calls() -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = shuffled_rows(2, 15)
    calls = [
        Call("random_mask", {"seeds": torch.tensor([3, -5])}, {"length": 7, "keep": 2}),
        Call(
            "patch_embed",
            {
                "image": draw(2, 3, 13, 7),
                "ids_keep": ids[:, :4],
                "weight": draw(8, 3, 4, 3),
                "bias": draw(8),
                "position": draw(16, 8),
                "cls_token": draw(1, 1, 8),
            },
            {"stride": (2, 2)},
        ),
        Call(
            "restore_tokens",
            {
                "tokens": draw(2, 5, 8),
                "ids_restore": ids.argsort(dim=1),
                "mask_token": draw(1, 1, 8),
                "position": draw(16, 8),
            },
            {"keep_cls": True},
        ),
        Call(
            "window_attention",
            {"qkv": draw(2, 15, 24), "bias": draw(2, 4, 4), "scale": draw(2).exp()},
            {"num_heads": 2, "grid": (5, 3), "window": 2, "shift": (1, 0), "cosine": True},
        ),
        Call(
            "masked_mse",
            {"pred": draw(2, 15, 18), "image": draw(2, 2, 15, 9), "ids_removed": ids[:, 4:]},
            {"patch_size": 3},
        ),
        Call(
            "linear_masked_mse",
            {
                "hidden": draw(2, 15, 8),
                "weight": draw(18, 8),
                "bias": draw(18),
                "image": draw(2, 2, 15, 9),
                "ids_removed": ids[:, 4:],
            },
            {"patch_size": 3},
        ),
        *(
            Call(
                operator,
                {
                    "x": draw(2, 5, 8),
                    "residual": draw(2, 5, 8),
                    "weight": draw(8),
                    "bias": draw(8),
                    "branch_scale": draw(2),
                },
                {"eps": 1e-6},
            )
            for operator in ("add_layer_norm", "layer_norm_add")
        ),
        Call(
            "mlp",
            {
                "x": draw(2, 5, 8),
                "fc1_weight": draw(16, 8),
                "fc1_bias": draw(16),
                "fc2_weight": draw(6, 16),
                "fc2_bias": draw(6),
            },
        ),
        Call("flash_attention", {"q": draw(2, 5, 2, 8), "k": draw(2, 5, 2, 8), "v": draw(2, 5, 2, 8)}),
    ]
    return {call.operator: call for call in calls}


CALLS = _small_calls()

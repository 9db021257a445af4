"""Every operator at the sizes of the paper's pre-training: ViT-B, 16 local decoder blocks, 1024 x 128 spectrograms."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mae_kernels
import torch
from torch import Tensor

FRAMES, MELS, PATCH = 1024, 128, 16
GRID = (FRAMES // PATCH, MELS // PATCH)
LENGTH = GRID[0] * GRID[1]
KEPT = int(LENGTH * (1 - 0.8))
REMOVED = LENGTH - KEPT
DIM, HEADS, HIDDEN = 768, 12, 3072
DECODER_DIM, DECODER_HEADS = 512, 16
WINDOW, SHIFT = (4, 4), (2, 0)
AREA = WINDOW[0] * WINDOW[1]


@dataclass(frozen=True)
class Floor:
    """What an operator must move and compute at least, as its module's docstring derives it.

    Attributes:
        read_and_written: Bytes.
        flops: Floating-point operations of its matrix products.
    """

    read_and_written: int
    flops: int = 0


@dataclass(frozen=True)
class Workload:
    """A call of an operator.

    Attributes:
        operator: Its name.
        tensors: Arguments; those that the model trains through require gradients.
        options: Arguments that are no tensors.
        forward: Floor of a call.
        backward: Floor of its backward, None where it has none.
    """

    operator: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    forward: Floor
    backward: Floor | None = None

    def __call__(self, impl: str) -> Tensor | tuple[Tensor, ...]:
        """Run the operator."""
        return getattr(mae_kernels, self.operator)(**self.tensors, **self.options, impl=impl)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that require gradients."""
        return [tensor for tensor in self.tensors.values() if tensor.requires_grad]


@dataclass
class Workloads:
    """Builds the workloads for one device and precision.

    Args:
        batch: Clips.
        device: Where the tensors live; ``"meta"`` for their shapes alone.
        dtype: Of what comes out of a matrix product: bfloat16 under autocast, float32 without. Parameters, the
            residual stream and the spectrogram are float32.
    """

    batch: int
    device: str
    dtype: torch.dtype
    generator: torch.Generator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.device != "meta":
            self.generator = torch.Generator(self.device).manual_seed(0)

    def _draw(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, spread: float = 1.0) -> Tensor:
        values = torch.randn(*shape, device=self.device, generator=self.generator) * spread
        return values.to(dtype).requires_grad_(grad)

    def _branch(self, *shape: int) -> Tensor:
        return self._draw(*shape, dtype=self.dtype)

    def _ids(self) -> Tensor:
        noise = torch.rand(self.batch, LENGTH, device=self.device, generator=self.generator)
        return noise.argsort(dim=1)

    def random_mask(self) -> Workload:
        """Masks of all clips."""
        seeds = torch.arange(self.batch, device=self.device)
        written = self.batch * LENGTH * (2 * 8 + 1)
        return Workload("random_mask", {"seeds": seeds}, {"length": LENGTH, "keep": KEPT}, Floor(written))

    def patch_embed(self) -> Workload:
        """Spectrograms to the encoder's tokens."""
        tensors = {
            "image": self._draw(self.batch, 1, FRAMES, MELS, grad=False),
            "ids_keep": self._ids()[:, :KEPT].contiguous(),
            "weight": self._draw(DIM, 1, PATCH, PATCH, spread=0.05),
            "bias": self._draw(DIM),
            "position": self._draw(LENGTH + 1, DIM, grad=False),
            "cls_token": self._draw(1, 1, DIM),
        }
        patches = self.batch * KEPT * PATCH * PATCH
        moved = 4 * (patches + DIM * PATCH * PATCH + self.batch * (KEPT + 1) * DIM)
        return Workload("patch_embed", tensors, {}, *[Floor(moved, 2 * patches * DIM)] * 2)

    def flash_attention(self) -> Workload:
        """Attention of an encoder block, on views of its packed projection."""
        tokens = KEPT + 1
        qkv = self._branch(self.batch, tokens, 3, HEADS, DIM // HEADS)
        q, k, v = (part.detach().requires_grad_() for part in qkv.unbind(2))
        one, product = q.numel() * q.element_size(), 2 * self.batch * tokens * tokens * DIM
        tensors = {"q": q, "k": k, "v": v}
        return Workload("flash_attention", tensors, {}, Floor(4 * one, 2 * product), Floor(8 * one, 5 * product))

    def mlp(self) -> Workload:
        """MLP of an encoder block."""
        x = self._branch(self.batch, KEPT + 1, DIM)
        tensors = {
            "x": x,
            "fc1_weight": self._draw(HIDDEN, DIM, spread=0.03),
            "fc1_bias": self._draw(HIDDEN),
            "fc2_weight": self._draw(DIM, HIDDEN, spread=0.03),
            "fc2_bias": self._draw(DIM),
        }
        weights, one = 2 * DIM * HIDDEN * x.element_size(), x.numel() * x.element_size()
        flops = 4 * x.numel() * HIDDEN
        return Workload("mlp", tensors, {}, Floor(2 * one + weights, flops), Floor(3 * one + 3 * weights, 2 * flops))

    def _norm(self, operator: str, tokens: int, dim: int) -> tuple[dict[str, Tensor], int, int]:
        x = self._branch(self.batch, tokens, dim)
        tensors = {"x": x, "residual": self._draw(*x.shape), "weight": self._draw(dim), "bias": self._draw(dim)}
        return tensors, x.numel() * x.element_size(), x.numel() * 4

    def add_layer_norm(self) -> Workload:
        """Residual sum and the next norm in an encoder block."""
        tensors, branch, stream = self._norm("add_layer_norm", KEPT + 1, DIM)
        floors = Floor(2 * (branch + stream)), Floor(3 * stream + 2 * branch if branch != stream else 4 * stream)
        return Workload("add_layer_norm", tensors, {"eps": 1e-6}, *floors)

    def layer_norm_add(self) -> Workload:
        """Norm of a branch and the residual sum in a local decoder block."""
        tensors, branch, stream = self._norm("layer_norm_add", LENGTH, DECODER_DIM)
        return Workload(
            "layer_norm_add", tensors, {"eps": 1e-6}, Floor(branch + 2 * stream), Floor(2 * branch + stream)
        )

    def restore_tokens(self) -> Workload:
        """The encoder's tokens to the decoder's."""
        tokens = self._branch(self.batch, KEPT + 1, DECODER_DIM)
        tensors = {
            "tokens": tokens,
            "ids_restore": self._ids(),
            "mask_token": self._draw(1, 1, DECODER_DIM),
            "position": self._draw(LENGTH + 1, DECODER_DIM, grad=False),
        }
        moved = tokens.numel() * tokens.element_size() + 4 * self.batch * LENGTH * DECODER_DIM + 8 * self.batch * LENGTH
        return Workload("restore_tokens", tensors, {}, *[Floor(moved)] * 2)

    def window_attention(self) -> Workload:
        """Attention of a shifted local decoder block."""
        qkv = self._branch(self.batch, LENGTH, 3 * DECODER_DIM)
        tensors = {
            "qkv": qkv,
            "bias": self._draw(DECODER_HEADS, AREA, AREA),
            "scale": torch.ones(DECODER_HEADS, device=self.device, requires_grad=True),
        }
        options = {"num_heads": DECODER_HEADS, "grid": GRID, "window": WINDOW, "shift": SHIFT, "cosine": True}
        third = qkv.numel() * qkv.element_size() // 3
        product = 2 * self.batch * LENGTH * AREA * DECODER_DIM
        return Workload(
            "window_attention", tensors, options, Floor(4 * third, 2 * product), Floor(7 * third, 5 * product)
        )

    def _scored(self) -> tuple[dict[str, Tensor], int]:
        tensors = {
            "image": self._draw(self.batch, 1, FRAMES, MELS, grad=False),
            "ids_removed": self._ids()[:, KEPT:].contiguous(),
        }
        return tensors, self.batch * REMOVED * PATCH * PATCH

    def masked_mse(self) -> Workload:
        """The loss of predictions."""
        scored, values = self._scored()
        pred = self._branch(self.batch, LENGTH, PATCH * PATCH)
        forward = values * (pred.element_size() + 4)
        # Residuals are written for backward and read there: less than reading predictions and image again.
        backward = (2 * values + pred.numel()) * pred.element_size()
        return Workload("masked_mse", {"pred": pred, **scored}, {"patch_size": PATCH}, Floor(forward), Floor(backward))

    def linear_masked_mse(self) -> Workload:
        """The prediction head and the loss."""
        scored, values = self._scored()
        hidden = self._draw(self.batch, LENGTH, DECODER_DIM)  # a LayerNorm's output, float32 under autocast too
        tensors = {
            "hidden": hidden,
            "weight": self._draw(PATCH * PATCH, DECODER_DIM, spread=0.05),
            "bias": self._draw(PATCH * PATCH),
            **scored,
        }
        rows, weight = self.batch * REMOVED, 4 * PATCH * PATCH * DECODER_DIM
        forward = rows * DECODER_DIM * 4 + weight + values * 4
        product = 2 * values * DECODER_DIM
        backward = rows * DECODER_DIM * 4 + hidden.numel() * 4 + 2 * weight
        floors = Floor(forward, product), Floor(backward, 2 * product)
        return Workload("linear_masked_mse", tensors, {"patch_size": PATCH}, *floors)


WORKLOADS: dict[str, Callable[[Workloads], Workload]] = {
    "random_mask": Workloads.random_mask,
    "patch_embed": Workloads.patch_embed,
    "flash_attention": Workloads.flash_attention,
    "mlp": Workloads.mlp,
    "add_layer_norm": Workloads.add_layer_norm,
    "layer_norm_add": Workloads.layer_norm_add,
    "restore_tokens": Workloads.restore_tokens,
    "window_attention": Workloads.window_attention,
    "masked_mse": Workloads.masked_mse,
    "linear_masked_mse": Workloads.linear_masked_mse,
}
"""A workload of every operator, in the order of the model."""

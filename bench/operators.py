"""Every operator at the sizes of the paper's pre-training, or at others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from audiomae.decoder import LocalBlock
from bench.workload import PATCH, VIT_B, Floor, Form, Sizes, Workload


@dataclass
class Workloads:
    """Builds the workloads for one device and precision.

    Args:
        batch: Clips.
        device: Where the tensors live; ``"meta"`` for their shapes alone.
        dtype: Of what comes out of a matrix product: bfloat16 under autocast, float32 without. Parameters, the
            residual stream and the spectrogram are float32.
        sizes: Of the model.
        seed: Of the values.
    """

    batch: int
    device: str
    dtype: torch.dtype
    sizes: Sizes = VIT_B
    seed: int = 0
    generator: torch.Generator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.device != "meta":
            self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def _draw(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, spread: float = 1.0) -> Tensor:
        values = torch.randn(*shape, device=self.device, generator=self.generator) * spread
        return values.to(dtype).requires_grad_(grad)

    def _branch(self, *shape: int) -> Tensor:
        return self._draw(*shape, dtype=self.dtype)

    def _image(self) -> Tensor:
        return self._draw(self.batch, 1, self.sizes.grid[0] * PATCH, self.sizes.grid[1] * PATCH, grad=False)

    def _ids(self) -> Tensor:
        noise = torch.rand(self.batch, self.sizes.length, device=self.device, generator=self.generator)
        return noise.argsort(dim=1)

    def _shape(self, tokens: int, width: int | None = None) -> dict[str, Any]:
        return {"batch": self.batch, "tokens": tokens} | ({} if width is None else {"width": width})

    def random_mask(self) -> Workload:
        """Masks of all clips."""
        length = self.sizes.length
        tensors = {"seeds": torch.arange(self.batch, device=self.device)}
        options = {"length": length, "keep": self.sizes.kept}
        written = self.batch * length * (2 * 8 + 1)
        return Workload("random_mask", tensors, options, self._shape(length), Floor(written))

    def patch_embed(self) -> Workload:
        """Spectrograms to the encoder's tokens."""
        dim, tokens = self.sizes.dim, self.sizes.kept + 1
        tensors = {
            "image": self._image(),
            "ids_keep": self._ids()[:, : self.sizes.kept].contiguous(),
            "weight": self._draw(dim, 1, PATCH, PATCH, spread=0.05),
            "bias": self._draw(dim),
            "position": self._draw(self.sizes.length + 1, dim, grad=False),
            "cls_token": self._draw(1, 1, dim),
        }
        patches = self.batch * self.sizes.kept * PATCH * PATCH
        floor = Floor(4 * (patches + dim * PATCH * PATCH + self.batch * tokens * dim), 2 * patches * dim)
        summed = self.batch * tokens
        return Workload("patch_embed", tensors, {}, self._shape(tokens, dim), floor, floor, summed)

    def flash_attention(self) -> Workload:
        """Attention of an encoder block, on views of its packed projection."""
        tokens, dim, heads = self.sizes.kept + 1, self.sizes.dim, self.sizes.heads
        qkv = self._branch(self.batch, tokens, 3, heads, dim // heads)
        q, k, v = (part.detach().requires_grad_() for part in qkv.unbind(2))
        one, product = q.numel() * q.element_size(), 2 * self.batch * tokens * tokens * dim
        floors = Floor(4 * one, 2 * product), Floor(8 * one, 5 * product)
        return Workload("flash_attention", {"q": q, "k": k, "v": v}, {}, self._shape(tokens, dim), *floors)

    def mlp(self) -> Workload:
        """MLP of an encoder block."""
        tokens, dim = self.sizes.kept + 1, self.sizes.dim
        hidden = 4 * dim
        x = self._branch(self.batch, tokens, dim)
        tensors = {
            "x": x,
            "fc1_weight": self._draw(hidden, dim, spread=0.03),
            "fc1_bias": self._draw(hidden),
            "fc2_weight": self._draw(dim, hidden, spread=0.03),
            "fc2_bias": self._draw(dim),
        }
        weights, one = 2 * dim * hidden * x.element_size(), x.numel() * x.element_size()
        flops = 4 * x.numel() * hidden
        floors = Floor(2 * one + weights, flops), Floor(3 * one + 3 * weights, 2 * flops)
        return Workload("mlp", tensors, {}, self._shape(tokens, dim), *floors, self.batch * tokens)

    def _norm(self, tokens: int, dim: int) -> tuple[dict[str, Tensor], int, int]:
        x = self._branch(self.batch, tokens, dim)
        tensors = {"x": x, "residual": self._draw(*x.shape), "weight": self._draw(dim), "bias": self._draw(dim)}
        return tensors, x.numel() * x.element_size(), x.numel() * 4

    def add_layer_norm(self) -> Workload:
        """Residual sum and the next norm in an encoder block."""
        tokens, dim = self.sizes.kept + 1, self.sizes.dim
        tensors, branch, stream = self._norm(tokens, dim)
        floors = Floor(2 * (branch + stream)), Floor(3 * stream + 2 * branch if branch != stream else 4 * stream)
        shape, summed = self._shape(tokens, dim), self.batch * tokens
        return Workload("add_layer_norm", tensors, {"eps": 1e-6}, shape, *floors, summed)

    def layer_norm_add(self) -> Workload:
        """Norm of a branch and the residual sum in a local decoder block."""
        tokens, dim = self.sizes.length, self.sizes.decoder_dim
        tensors, branch, stream = self._norm(tokens, dim)
        floors = Floor(branch + 2 * stream), Floor(2 * branch + stream)
        shape, summed = self._shape(tokens, dim), self.batch * tokens
        return Workload("layer_norm_add", tensors, {"eps": 1e-6}, shape, *floors, summed)

    def restore_tokens(self) -> Workload:
        """The encoder's tokens to the decoder's."""
        length, dim = self.sizes.length, self.sizes.decoder_dim
        tokens = self._branch(self.batch, self.sizes.kept + 1, dim)
        tensors = {
            "tokens": tokens,
            "ids_restore": self._ids(),
            "mask_token": self._draw(1, 1, dim),
            "position": self._draw(length + 1, dim, grad=False),
        }
        floor = Floor(tokens.numel() * tokens.element_size() + 4 * self.batch * length * dim + 8 * self.batch * length)
        return Workload("restore_tokens", tensors, {}, self._shape(length, dim), floor, floor)

    def window_attention(self) -> Workload:
        """Attention of a shifted local decoder block."""
        length, dim, heads, area = self.sizes.length, self.sizes.decoder_dim, self.sizes.decoder_heads, self.sizes.area
        qkv = self._branch(self.batch, length, 3 * dim)
        tensors = {
            "qkv": qkv,
            "bias": self._draw(heads, area, area),
            "scale": torch.ones(heads, device=self.device, requires_grad=True),
        }
        options = {
            "num_heads": heads,
            "grid": self.sizes.grid,
            "window": self.sizes.window,
            "shift": self.sizes.shift,
            "cosine": True,
        }
        third = qkv.numel() * qkv.element_size() // 3
        product = 2 * self.batch * length * area * dim
        floors = Floor(4 * third, 2 * product), Floor(7 * third, 5 * product)
        return Workload("window_attention", tensors, options, self._window_shape(), *floors)

    def _window_shape(self) -> dict[str, Any]:
        window = "x".join(map(str, self.sizes.window))
        return self._shape(self.sizes.length, self.sizes.decoder_dim) | {"window": window}

    def local_block(self) -> Workload:
        """A whole shifted block of the local decoder: what a user of another library has one module for."""
        length, dim, heads, area = self.sizes.length, self.sizes.decoder_dim, self.sizes.decoder_heads, self.sizes.area
        grid, window, shift = self.sizes.grid, self.sizes.window, self.sizes.shift

        def block(impl: str) -> LocalBlock:
            return LocalBlock(dim, heads, grid, window, shift, impl=impl)

        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in block("auto").named_parameters()}
        parameters = {name: self._draw(*shape, spread=0.05) for name, shape in shapes.items()}
        with torch.no_grad():
            for name in ("attn.tau", "norm1.weight", "norm2.weight"):
                parameters[name] += 1
        parameters["attn.meta_mlp.fc2.bias"].requires_grad_(False)  # softmax does not see it: its gradient is zero
        x = self._draw(self.batch, length, dim)  # the residual stream

        def build(impl: str, exact: bool) -> Form:
            module = block(impl).to(self.device, torch.float64 if exact else torch.float32)

            def call(tensors: dict[str, Tensor]) -> Tensor:
                named = dict(tensors)
                stream = named.pop("x")
                return functional_call(module, named, (stream,))

            return call

        weights = sum(parameter.numel() for parameter in parameters.values())
        rows, size = self.batch * length, torch.empty((), dtype=self.dtype).element_size()
        # qkv, proj and the two products of the MLP: 12 dim^2 weights a token; attention: two products of its area.
        flops = rows * (24 * dim * dim + 4 * area * dim)
        floors = (
            Floor(2 * 4 * rows * dim + size * weights, flops),
            Floor(3 * 4 * rows * dim + 2 * size * weights, 2 * flops),
        )
        options = {"num_heads": heads, "grid": grid, "window": window, "shift": shift}
        tensors = {"x": x} | parameters
        return Workload("local_block", tensors, options, self._window_shape(), *floors, rows, build)

    def _scored(self) -> tuple[dict[str, Tensor], int]:
        tensors = {"image": self._image(), "ids_removed": self._ids()[:, self.sizes.kept :].contiguous()}
        return tensors, self.batch * self.sizes.removed * PATCH * PATCH

    def masked_mse(self) -> Workload:
        """The loss of predictions."""
        scored, values = self._scored()
        pred = self._branch(self.batch, self.sizes.length, PATCH * PATCH)
        forward = values * (pred.element_size() + 4)
        # Residuals are written for backward and read there: less than reading predictions and image again.
        backward = (2 * values + pred.numel()) * pred.element_size()
        floors = Floor(forward), Floor(backward)
        shape = self._shape(self.sizes.length)
        return Workload("masked_mse", {"pred": pred, **scored}, {"patch_size": PATCH}, shape, *floors)

    def linear_masked_mse(self) -> Workload:
        """The prediction head and the loss."""
        length, dim = self.sizes.length, self.sizes.decoder_dim
        scored, values = self._scored()
        hidden = self._draw(self.batch, length, dim)  # a LayerNorm's output, float32 under autocast too
        tensors = {
            "hidden": hidden,
            "weight": self._draw(PATCH * PATCH, dim, spread=0.05),
            "bias": self._draw(PATCH * PATCH),
            **scored,
        }
        rows, weight = self.batch * self.sizes.removed, 4 * PATCH * PATCH * dim
        forward = rows * dim * 4 + weight + values * 4
        product = 2 * values * dim
        backward = rows * dim * 4 + hidden.numel() * 4 + 2 * weight
        floors = Floor(forward, product), Floor(backward, 2 * product)
        shape = self._shape(length, dim)
        return Workload("linear_masked_mse", tensors, {"patch_size": PATCH}, shape, *floors, rows)


WORKLOADS: dict[str, Callable[[Workloads], Workload]] = {
    "random_mask": Workloads.random_mask,
    "patch_embed": Workloads.patch_embed,
    "flash_attention": Workloads.flash_attention,
    "mlp": Workloads.mlp,
    "add_layer_norm": Workloads.add_layer_norm,
    "layer_norm_add": Workloads.layer_norm_add,
    "restore_tokens": Workloads.restore_tokens,
    "window_attention": Workloads.window_attention,
    "local_block": Workloads.local_block,
    "masked_mse": Workloads.masked_mse,
    "linear_masked_mse": Workloads.linear_masked_mse,
}
"""A workload of every operator, and of the decoder's block, in the order of the model."""

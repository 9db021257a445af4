"""What pre-norm transformer blocks are made of."""

from typing import Any

import torch
from torch import Tensor, nn

from mae_kernels._forms import check_impl
from mae_kernels.modules._sizes import check_count, check_heads
from mae_kernels.ops.add_layer_norm import add_layer_norm
from mae_kernels.ops.flash_attention import flash_attention
from mae_kernels.ops.mlp import mlp


class AddLayerNorm(nn.Module):
    """Add a branch to its residual stream and normalise the sum, for the norm that follows in a pre-norm stack.

    ``weight`` and ``bias (dim,)`` are those of the ``nn.LayerNorm`` that it stands in for, and start at 1 and 0.

    Args:
        dim: Width of a token.
        eps: Added to the variance: 1e-6 in MAE and timm's ViT; ``nn.LayerNorm``'s own default is 1e-5.
        device: Of the parameters.
        dtype: Of the parameters.
        impl: Form of the operator.

    Raises:
        ValueError: A width that is not positive.
    """

    def __init__(
        self, dim: int, eps: float, *, device: Any = None, dtype: torch.dtype | None = None, impl: str = "auto"
    ):
        super().__init__()
        check_impl(impl)
        check_count("AddLayerNorm", "dim", dim)
        self.dim, self.eps, self.impl = dim, eps, impl
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor, branch_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add and normalise.

        Args:
            x: Output of the branch, ``(B, ..., dim)``.
            residual: The stream, ``(B, ..., dim)``.
            branch_scale: ``(B,)``, multiplies a sample's branch: stochastic depth draws 0 or 1 / (1 - rate).

        Returns:
            ``(sum, normed)``: the new stream, and the input of the next branch. Under autocast as
            :func:`mae_kernels.add_layer_norm` gives them.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape or device.
        """
        return add_layer_norm(
            x, residual, self.weight, self.bias, eps=self.eps, branch_scale=branch_scale, impl=self.impl
        )

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"{self.dim}, eps={self.eps}, impl={self.impl!r}"


class FusedMlp(nn.Module):
    """Linear, GELU, linear, ``(..., dim)`` to the same; the activation is computed again in backward.

    Parameters are those of timm's ``Mlp``, ``fc1`` and ``fc2``, with the initialisation of ``nn.Linear``. It has no
    dropout.

    Args:
        dim: Width of a token.
        hidden_dim: Width between the layers; by default 4 dim.
        device: Of the parameters.
        dtype: Of the parameters.
        impl: Form of the operator.

    Raises:
        ValueError: A width that is not positive.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        check_impl(impl)
        check_count("FusedMlp", "dim", dim)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        check_count("FusedMlp", "hidden_dim", hidden_dim)
        self.impl = impl
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers to ``x (..., dim)``; errors as :func:`mae_kernels.mlp`."""
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, impl=self.impl)

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"impl={self.impl!r}"


class FlashSelfAttention(nn.Module):
    """Multi-head self-attention over all tokens, ``(B, N, dim)`` to the same.

    Parameters are those of timm's ``Attention``, ``qkv`` and ``proj``, with the initialisation of ``nn.Linear``. It has
    no dropout and takes no mask.

    Args:
        dim: Width of a token.
        num_heads: Heads, which divide ``dim``.
        qkv_bias: The projection to queries, keys and values has a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        impl: Form of the operator.

    Raises:
        ValueError: Sizes that are not positive, or heads that do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        check_impl(impl)
        check_heads("FlashSelfAttention", dim, num_heads)
        self.num_heads, self.impl = num_heads, impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the tokens of ``x (B, N, dim)``; errors as :func:`mae_kernels.flash_attention`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(flash_attention(q, k, v, impl=self.impl).flatten(2))

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"num_heads={self.num_heads}, impl={self.impl!r}"

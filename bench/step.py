"""The pre-training step of ViT-B with the local decoder, as every benchmark of it runs it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from audiomae import AudioMAE, AudioMAEConfig, PatchMask
from audiomae.training.optimizer import build_adamw


class Step(NamedTuple):
    """A training step on one batch.

    Attributes:
        model: What is trained.
        forward: Computes the loss under the masks of a batch.
        run: Draws masks, computes loss and gradients, and takes an optimiser step; does not wait for the device.
    """

    model: AudioMAE
    forward: Callable[[], Tensor]
    run: Callable[[], None]


def build_step(
    impl: str,
    device: torch.device,
    batch: int,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
    config: AudioMAEConfig | None = None,
) -> Step:
    """Build a step.

    Args:
        impl: Form of the operators.
        device: Where it runs.
        batch: Clips.
        dtype: Of autocast; float32 is none.
        compiled: Run the model through torch.compile.
        config: The model, ViT-B with the local decoder by default.
    """
    torch.manual_seed(0)
    model = AudioMAE(config or AudioMAEConfig(), impl=impl).to(device)
    optimizer = build_adamw(model, lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.95))
    spec = torch.randn(batch, 1, *model.config.spec_size, device=device)
    seeds = torch.arange(batch, device=device)
    call = torch.compile(model) if compiled else model

    def forward() -> Tensor:
        mask = PatchMask.random(seeds, model.grid, ratio=0.8, impl=impl)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return call(spec, mask).loss

    def run() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Step(model, forward, run)

"""The training steps of ViT-B, as every benchmark runs them: pre-training with the local decoder, and fine-tuning."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audiomae import AudioClassifier, AudioClassifierConfig, AudioMAE, AudioMAEConfig, PatchMask
from audiomae.training.optimizer import build_adamw, build_layer_decayed_adamw


class Step(NamedTuple):
    """A training step on one batch.

    Attributes:
        model: What is trained.
        forward: Computes the loss under the masks of a batch.
        run: Draws masks, computes loss and gradients, and takes an optimiser step; does not wait for the device.
    """

    model: AudioMAE | AudioClassifier
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

    return Step(model, forward, stepper(forward, optimizer))


def build_finetuning_step(impl: str, device: torch.device, batch: int, dtype: torch.dtype, *, masked: bool) -> Step:
    """Build a fine-tuning step of ViT-B on AudioSet's classes, with binary cross-entropy and drop path.

    Args:
        impl: Form of the operators.
        device: Where it runs.
        batch: Clips.
        dtype: Of autocast; float32 is none.
        masked: Drop 0.3 of the time steps and 0.3 of the frequencies.
    """
    torch.manual_seed(0)
    model = AudioClassifier(AudioClassifierConfig(drop_path=0.1), impl=impl).to(device)
    optimizer = build_layer_decayed_adamw(model, lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.95), layer_decay=1.0)
    spec = torch.randn(batch, 1, *model.config.spec_size, device=device)
    target = torch.rand(batch, model.config.num_classes, device=device).round()
    seeds = torch.arange(batch, device=device)

    def forward() -> Tensor:
        mask = PatchMask.time_frequency(seeds, model.grid, 0.3, 0.3) if masked else None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(spec, mask, seeds)
        return F.binary_cross_entropy_with_logits(logits.float(), target)

    return Step(model, forward, stepper(forward, optimizer))


def stepper(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Make a whole training step of a loss; it does not wait for the device."""

    def run() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run

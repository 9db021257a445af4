"""The training steps and the inference that benchmarks run, each on one batch of random spectrograms."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiomae import AudioClassifier, AudioClassifierConfig, AudioMAE, AudioMAEConfig, PatchMask
from audiomae.training.optimizer import build_adamw, build_layer_decayed_adamw
from bench.precision import autocast
from bench.turns import Mark, unmarked

ALL = slice(None)

Gradient = dict[str, Tensor]
"""The ``"loss"``, and as ``"gradient"`` those of all parameters in one vector."""


@dataclass(frozen=True)
class Step:
    """A training step on one batch.

    Attributes:
        model: What is trained.
        loss: Computes the loss by ``loss(mark, clips)``; ``clips`` are those of the batch that count.
        optimizer: Of the model's parameters; None takes no step.
        inputs: The batch.
    """

    model: nn.Module
    loss: Callable[[Mark, slice], Tensor]
    optimizer: torch.optim.Optimizer | None
    inputs: tuple[Tensor, ...]

    def forward(self) -> Tensor:
        """Compute the loss."""
        return self.loss(unmarked, ALL)

    def __call__(self, turn: int, mark: Mark) -> None:
        """Draw masks, compute loss and gradients, and take an optimiser step; does not wait for the device."""
        self.loss(mark, ALL).backward()
        mark("encoder")
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad()
        mark("optimiser")

    def gradient(self, clips: int | None = None) -> Gradient:
        """Compute loss and gradients and train nothing.

        Args:
            clips: At a time, a divisor of the batch; all by default.
        """
        batch = len(self.inputs[0])
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        parts = [slice(i, i + (clips or batch)) for i in range(0, batch, clips or batch)]
        losses, gradients = [], []
        for part in parts:
            loss = self.loss(unmarked, part)
            found = torch.autograd.grad(loss, parameters)
            losses.append(loss.detach())
            gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        return {"loss": sum(losses) / len(parts), "gradient": sum(gradients) / len(parts)}


def build_pretraining_step(
    impl: str, device: torch.device, batch: int, dtype: torch.dtype, config: AudioMAEConfig | None = None
) -> Step:
    """Build a step of pre-training.

    Args:
        impl: Form of the operators.
        device: Where it runs.
        batch: Clips.
        dtype: Of autocast; float32 is none, and float64 makes the model itself float64.
        config: The model, ViT-B with the local decoder by default.
    """
    torch.manual_seed(0)
    model = AudioMAE(config or AudioMAEConfig(), impl=impl).to(device)
    optimizer = build_adamw(model, lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.95))
    spec = torch.randn(batch, 1, *model.config.spec_size, device=device)
    seeds = torch.arange(batch, device=device)
    spec = _in_precision(model, spec, dtype)

    def loss(mark: Mark, clips: slice) -> Tensor:
        mask = PatchMask.random(seeds[clips], model.grid, ratio=0.8, impl=impl)
        mark("masks")
        with autocast(device, dtype):
            result = model(spec[clips], mask).loss
        mark("loss")
        return result

    return Step(model, loss, optimizer, (spec, seeds))


def build_finetuning_step(impl: str, device: torch.device, batch: int, dtype: torch.dtype, *, masked: bool) -> Step:
    """Build a fine-tuning step of ViT-B on AudioSet's classes, with binary cross-entropy and drop path.

    Args:
        impl: Form of the operators.
        device: Where it runs.
        batch: Clips.
        dtype: As for :func:`build_pretraining_step`.
        masked: Drop 0.3 of the time steps and 0.3 of the frequencies.
    """
    torch.manual_seed(0)
    model = AudioClassifier(AudioClassifierConfig(drop_path=0.1), impl=impl).to(device)
    optimizer = build_layer_decayed_adamw(model, lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.95), layer_decay=1.0)
    spec = torch.randn(batch, 1, *model.config.spec_size, device=device)
    target = torch.rand(batch, model.config.num_classes, device=device).round()
    seeds = torch.arange(batch, device=device)
    spec = _in_precision(model, spec, dtype)

    def loss(mark: Mark, clips: slice) -> Tensor:
        mask = PatchMask.time_frequency(seeds[clips], model.grid, 0.3, 0.3) if masked else None
        mark("masks")
        with autocast(device, dtype):
            logits = model(spec[clips], mask, seeds[clips])
        result = F.binary_cross_entropy_with_logits(logits, target[clips].to(logits.dtype))
        mark("loss")
        return result

    return Step(model, loss, optimizer, (spec, target, seeds))


def _in_precision(model: nn.Module, spec: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a model and its input float64, which is no autocast's."""
    if dtype != torch.float64:
        return spec
    model.double()
    return spec.double()

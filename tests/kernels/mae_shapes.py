"""Tiny masked autoencoders of the shapes that users keep, and how a fused model is compared with the model before."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench import audio_mae_models, mae_models

from .tolerance import KERNEL_ERROR

SMALL = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
SPECTROGRAM = {"img_size": (32, 16), "patch_size": 4}

# Class, what it is made with, and images (C, H, W).
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, int, int]]] = {
    "image": (mae_models.MaskedAutoencoderViT, {"img_size": 64, "norm_pix_loss": True}, (3, 64, 64)),
    "image-pixels": (mae_models.MaskedAutoencoderViT, {"img_size": 15, "patch_size": 5, "in_chans": 2}, (2, 15, 15)),
    "audio-global": (audio_mae_models.MaskedAutoencoderViT, SPECTROGRAM | {"norm_pix_loss": True}, (1, 32, 16)),
    "audio-local": (audio_mae_models.MaskedAutoencoderViT, SPECTROGRAM | {"decoder_mode": 1}, (1, 32, 16)),
    "audio-2d": (
        audio_mae_models.MaskedAutoencoderViT,
        SPECTROGRAM | {"mask_2d": True, "norm_pix_loss": True},
        (1, 32, 16),
    ),
    "audio-overlap": (
        audio_mae_models.MaskedAutoencoderViT,
        SPECTROGRAM | {"use_custom_patch": True, "stride": 3, "norm_pix_loss": True},
        (1, 32, 16),
    ),
    "audio-overlap-local": (
        audio_mae_models.MaskedAutoencoderViT,
        SPECTROGRAM | {"use_custom_patch": True, "stride": 3, "decoder_mode": 1},
        (1, 32, 16),
    ),
}


def make_model(name: str, **options: Any) -> nn.Module:
    """A model of ``MODELS``, in float64."""
    cls, made_with, _ = MODELS[name]
    torch.manual_seed(0)
    model = cls(**SMALL | made_with | options)
    spread(model)
    return model.double()


def spread(model: nn.Module) -> None:
    """Move parameters off the values at which mistakes do not show: zero biases, unit norms."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def make_images(shape: tuple[int, int, int], batch: int = 3) -> Tensor:
    """Images in float64."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def reconstruct(call: Callable[[], tuple[Any, ...]], model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """What a model gives from a seed, with all gradients and the random number that would come next.

    Args:
        call: Runs the model; gives its loss, its predictions and what else it returns.
        model: Whose gradients are taken.
        seed: Of all random numbers.
    """
    torch.manual_seed(seed)
    loss, pred, *others = call()
    results = {"next random number": torch.rand(()), "loss": loss, "predictions": pred}
    results |= {f"output {i}": other for i, other in enumerate(others)}
    # The predictions have a gradient of their own, so that those of visible patches count.
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(pred.shape, generator=generator, dtype=torch.float64).to(pred)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(1.3 * loss + (pred * upstream).mean(), parameters)
    results |= {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {name: result.detach() for name, result in results.items()}


def assert_rounding(actual: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Hold results to at most twice the error of the model before in the same precision, and a rounding.

    Args:
        actual: Of the fused model.
        plain: Of the model before.
        truth: Of the model before in float64.
    """
    assert actual.keys() == plain.keys() == truth.keys()
    precision = torch.bfloat16 if plain["predictions"].dtype == torch.bfloat16 else torch.float32
    largest = max(exact.double().norm().item() for exact in truth.values())
    for what, exact in truth.items():
        assert (actual[what].shape, actual[what].dtype) == (plain[what].shape, plain[what].dtype), what
        error, allowed = ((x[what].double() - exact.double()).norm().item() for x in (actual, plain))
        size = exact.double().norm().item()
        if size < 1e-12 * largest:  # zero but for rounding, as the gradient of what softmax takes out
            size = 1e-3 * largest
        bound = 2 * allowed + KERNEL_ERROR[precision] * size
        assert error <= bound, f"{what} is off by {error:.2e}, PyTorch by {allowed:.2e}: over {bound:.2e}"


def steps(model: nn.Module, call: Callable[[nn.Module], Tensor], count: int = 3) -> dict[str, Tensor]:
    """Train a copy for some steps; the losses and the parameters after them."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(count):
        loss = call(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | {name: p.detach() for name, p in model.named_parameters()}

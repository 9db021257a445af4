"""Fused forms of ``MaskedAutoencoderViT``: image MAE's class and Audio-MAE's, which users keep in a file of their own.

Masks are drawn by the model's own methods, given the places of the patches instead of their tokens: so they are the
same masks from the same random numbers, whatever the strategy, and the visible patches are known before anything is
projected. Only they are; the decoder's input is written in one pass; the loss reads the removed patches alone.

A class of that name may be anybody's variant. So before a model is fused, its methods and the fused ones run on a
small double of it, without its blocks, and must agree in outputs and gradients.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mae_kernels.ops.masked_mse import masked_mse
from mae_kernels.ops.patch_embed import patch_embed
from mae_kernels.ops.restore_tokens import restore_tokens
from mae_kernels.patching.core import Fused, Target, find_unexpected, fused_class, hooks_of

NAME = "MaskedAutoencoderViT"
OPERATORS = ("patch_embed", "restore_tokens", "masked_mse")
METHODS = ("forward_encoder", "forward_decoder", "forward_loss")

# Tensors, parts that are read, and parts that are called.
TENSORS = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed")
READ = {"patch_embed.proj": nn.Conv2d, "blocks": nn.ModuleList, "decoder_blocks": nn.ModuleList}
CALLED = ("patch_embed", "norm", "decoder_embed", "decoder_norm", "decoder_pred")

# Of the patches, removed in a trial.
TRIAL_RATIO = 0.75


def place_ids(batch: int, length: int, device: torch.device) -> Tensor:
    """The places of the patches as tokens of one value, ``(batch, length, 1)`` int64: masked, they are ids to keep."""
    return torch.arange(length, device=device)[:, None].expand(batch, -1, -1)


def removed_ids(mask: Tensor, removed: int) -> Tensor:
    """Ids ``(B, removed)`` of the patches that ``mask (B, L)`` removes, which are that many a row."""
    return mask.argsort(dim=1, descending=True, stable=True)[:, :removed]


def version_of(mask: Tensor) -> int | None:
    """How often a tensor was written to; None where that is not counted."""
    return None if torch.compiler.is_compiling() or mask.is_inference() else mask._version


def encode(
    model: Any, image: Tensor, draw: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode the visible patches; ``draw`` masks tokens. Returns them, the mask and ids_restore."""
    projection, position = model.patch_embed.proj, model.pos_embed[0]
    length = position.shape[0] - 1
    kept, mask, ids_restore = draw(place_ids(image.shape[0], length, image.device))
    # The loss has to know how many are removed without waiting for the device; a mask written to since is another.
    mask.removed_patches = length - kept.shape[1], version_of(mask)  # type: ignore[attr-defined]
    tokens = patch_embed(
        image,
        kept[:, :, 0],
        projection.weight,
        projection.bias,
        position,
        model.cls_token,
        stride=projection.stride,
        impl=model.fused_impl,
    )
    for block in model.blocks:
        tokens = block(tokens)
    return model.norm(tokens), mask, ids_restore


def decode(model: Any, tokens: Tensor, ids_restore: Tensor, *, keep_cls: bool) -> Tensor:
    """Predict all patches; ``keep_cls`` shows the class token to the decoder's blocks."""
    hidden = restore_tokens(
        model.decoder_embed(tokens),
        ids_restore,
        model.mask_token,
        model.decoder_pos_embed[0],
        keep_cls=keep_cls,
        impl=model.fused_impl,
    )
    for block in model.decoder_blocks:
        hidden = block(hidden)
    if keep_cls:  # dropped before the predictions, which are wider, so that these are written once
        hidden = hidden[:, 1:]
    return model.decoder_pred(model.decoder_norm(hidden))


def score(model: Any, image: Tensor, pred: Tensor, mask: Tensor, normalize: bool) -> Tensor | None:
    """Score the removed patches; None for a mask that :func:`encode` has not made, or that removes nothing."""
    removed, version = getattr(mask, "removed_patches", (0, None))
    if removed * mask.shape[0] == 0 or version != version_of(mask):
        return None
    projection = model.patch_embed.proj
    return masked_mse(
        pred,
        image,
        removed_ids(mask, removed),
        patch_size=projection.kernel_size,
        stride=projection.stride,
        normalize=normalize,
        impl=model.fused_impl,
    )


def takes(model: Any, image: Tensor) -> bool:
    """Whether an image has the model's size, and nothing was put into or around its patch embedding."""
    return tuple(image.shape[2:]) == tuple(model.patch_embed.img_size) and find_hidden(model) is None


def find_hidden(model: Any) -> str | None:
    """Say what is to run in or around the parts that are read."""
    if any(hooks_of(model.patch_embed)):
        return "patch_embed has hooks, which would not run"
    return find_unexpected(model, READ)


class FusedImageMAE(Fused, nn.Module):
    """Image MAE with visible patches alone embedded and removed patches alone scored."""

    def forward_encoder(self: Any, x: Tensor, mask_ratio: float) -> Any:
        """Encode the visible patches of ``x (N, C, H, W)``; returns them, the mask and ids_restore."""
        if not takes(self, x):
            return super().forward_encoder(x, mask_ratio)  # type: ignore[misc]
        return encode(self, x, partial(self.random_masking, mask_ratio=mask_ratio))

    def forward_decoder(self: Any, x: Tensor, ids_restore: Tensor) -> Any:
        """Predict all patches, ``(N, L, P)``."""
        return decode(self, x, ids_restore, keep_cls=True)

    def forward_loss(self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Any:
        """Score the removed patches."""
        loss = score(self, imgs, pred, mask, self.norm_pix_loss)
        return super().forward_loss(imgs, pred, mask) if loss is None else loss  # type: ignore[misc]


class FusedAudioMAE(Fused, nn.Module):
    """Audio-MAE with visible patches alone embedded and removed patches alone scored."""

    def forward_encoder(self: Any, x: Tensor, mask_ratio: float, mask_2d: bool = False) -> Any:
        """Encode the visible patches of ``x (N, C, T, F)``; returns them, the mask, ids_restore and None."""
        if not takes(self, x):
            return super().forward_encoder(x, mask_ratio, mask_2d)  # type: ignore[misc]
        if mask_2d:
            draw = partial(self.random_masking_2d, mask_t_prob=self.mask_t_prob, mask_f_prob=self.mask_f_prob)
        else:
            draw = partial(self.random_masking, mask_ratio=mask_ratio)
        return *encode(self, x, draw), None

    def forward_decoder(self: Any, x: Tensor, ids_restore: Tensor) -> Any:
        """Predict all patches, ``(N, L, P)``; returns them and two None."""
        return decode(self, x, ids_restore, keep_cls=self.decoder_mode == 0), None, None

    def forward_loss(self: Any, imgs: Tensor, pred: Tensor, mask: Tensor, norm_pix_loss: bool = False) -> Any:
        """Score the removed patches."""
        loss = score(self, imgs, pred, mask, norm_pix_loss)
        if loss is None:
            return super().forward_loss(imgs, pred, mask, norm_pix_loss)  # type: ignore[misc]
        return loss


class Stub(nn.Module):
    """Stands for a block in a trial: mixes values and tokens, so that whatever it is given shows in what follows."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x (B, N, D)``."""
        self.calls += 1
        return self.factor * x.roll(1, dims=2) + x.mean(dim=1, keepdim=True).tanh()


def double_of(module: nn.Module) -> nn.Module:
    """Copy a module's parameters and buffers to the CPU in float64; its hooks are left out, all else is shared."""
    double = object.__new__(type(module))
    vars(double).update(vars(module))
    vars(double).update(
        _parameters={
            name: p if p is None else nn.Parameter(p.detach().to("cpu", torch.float64, copy=True), p.requires_grad)
            for name, p in module._parameters.items()
        },
        _buffers={
            name: b.to("cpu", torch.float64) if b is not None and b.is_floating_point() else b
            for name, b in module._buffers.items()
        },
        _modules={name: child if child is None else double_of(child) for name, child in module._modules.items()},
        _forward_hooks={},
        _forward_pre_hooks={},
        _backward_hooks={},
        _backward_pre_hooks={},
    )
    return double


def trial_model(model: nn.Module) -> nn.Module:
    """A double of a masked autoencoder with two stubs for each stack of blocks, and without parts of other names."""
    bare = object.__new__(type(model))
    vars(bare).update(vars(model), _modules={name: getattr(model, name) for name in CALLED})
    double = double_of(bare)
    for name in ("blocks", "decoder_blocks"):
        setattr(double, name, nn.ModuleList([Stub(0.9), Stub(-1.1)]))
    return double


def try_out(
    model: Any, train: bool, encoder_options: Mapping[str, Any], loss_options: Mapping[str, Any]
) -> dict[str, Sequence[Any]]:
    """Run the replaced methods of a trial's model; what each gives, then the gradients and the calls of the stubs."""
    generator = torch.Generator().manual_seed(0)
    projection = model.patch_embed.proj
    shape = (2, projection.in_channels, *model.patch_embed.img_size)
    image = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    model.train(train)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoded = model.forward_encoder(image, TRIAL_RATIO, **encoder_options)
        decoded = model.forward_decoder(encoded[0], encoded[2])
        decoded = decoded if isinstance(decoded, tuple) else (decoded,)
        loss = model.forward_loss(image, decoded[0], encoded[1], **loss_options)
        loss.backward()
    calls = torch.tensor([stub.calls for stub in model.modules() if isinstance(stub, Stub)], device="cpu")
    gradients = [parameter.grad for parameter in model.parameters()]
    return {
        "forward_encoder": encoded,
        "forward_decoder": decoded,
        "forward_loss": (loss,),
        "backward": (*gradients, calls),
    }


def agree(one: Any, other: Any) -> bool:
    """Whether two results of a trial are the same up to rounding."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return one is None and other is None
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.allclose(one, other, rtol=1e-7, atol=1e-9)


def find_difference(
    model: nn.Module,
    fusion: type[Fused],
    encoder_options: Mapping[str, Any],
    loss_options: Mapping[str, Any],
) -> str | None:
    """Say which method of a model is not the known one, by its arguments or by what it computes.

    Args:
        model: Any class of the name.
        fusion: With the methods that are to replace the model's.
        encoder_options: What the model gives its ``forward_encoder`` besides image and ratio.
        loss_options: What it gives its ``forward_loss`` besides image, predictions and mask.
    """
    for name in (*TENSORS, *CALLED):
        getattr(model, name)  # what is missing is told by name
    reason = find_other_arguments(type(model), fusion, METHODS)
    if reason is not None:
        return reason
    try:
        own, fused = trial_model(model), trial_model(model)
        fused.__class__ = fused_class(type(model), fusion)
        vars(fused)["fused_impl"] = "reference"
        for train in (True, False):
            given, known = (try_out(double, train, encoder_options, loss_options) for double in (own, fused))
            for what, results in given.items():
                if len(results) != len(known[what]) or not all(map(agree, results, known[what])):
                    return f"its {what} gives other values than the known one"
    except Exception as error:  # whatever a stranger's code may raise
        return f"a trial of its methods failed: {type(error).__name__}: {error}"
    return None


def arguments_of(owner: type, method: str) -> list[str]:
    """A method's arguments, each with its default, without ``self`` and annotations."""
    parameters = list(inspect.signature(getattr(owner, method)).parameters.values())[1:]
    return [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters]


def find_other_arguments(owner: type, fusion: type[Fused], methods: Sequence[str]) -> str | None:
    """Say which method of a class does not take what the mixin's takes that is to replace it."""
    for name in methods:
        given, known = arguments_of(owner, name), arguments_of(fusion, name)
        if given != known:
            return f"its {name} takes ({', '.join(given)}), expected ({', '.join(known)})"
    return None


def find_image_refusal(model: Any) -> str | None:
    """Why an image MAE cannot be fused."""
    return find_hidden(model) or find_difference(model, FusedImageMAE, {}, {})


def find_audio_refusal(model: Any) -> str | None:
    """Why an Audio-MAE cannot be fused."""
    return find_hidden(model) or find_difference(
        model, FusedAudioMAE, {"mask_2d": model.mask_2d}, {"norm_pix_loss": model.norm_pix_loss}
    )


@dataclass(frozen=True)
class AudioTarget(Target):
    """Audio-MAE's class, which has the name of image MAE's and another encoder."""

    def matches(self, candidate: type) -> bool:
        """Whether the target is this very class."""
        if not super().matches(candidate) or not hasattr(candidate, "forward_encoder"):
            return False
        return "mask_2d=False" in arguments_of(candidate, "forward_encoder")


TARGETS: tuple[Target, ...] = (
    AudioTarget(NAME, FusedAudioMAE, OPERATORS, find_audio_refusal),
    Target(NAME, FusedImageMAE, OPERATORS, find_image_refusal),
)

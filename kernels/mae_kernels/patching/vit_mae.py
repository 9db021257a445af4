"""Fused forms of transformers' ViTMAE, as its version 5.24 has it; of version 5.0, the embeddings alone are the same.

Embeddings, decoder and model change like those of :mod:`mae_kernels.patching.mae`. A layer's attention, MLP, and
addition with the norm after it change each for itself, so that transformers records hidden states and attentions by its
hooks on layers and attentions as before. A call that asks for attention weights or brings an attention mask takes the
library's own path.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mae_kernels.ops.add_layer_norm import add_layer_norm
from mae_kernels.ops.flash_attention import flash_attention
from mae_kernels.ops.masked_mse import masked_mse
from mae_kernels.ops.mlp import mlp
from mae_kernels.ops.patch_embed import patch_embed
from mae_kernels.ops.restore_tokens import restore_tokens
from mae_kernels.patches import grid_shape
from mae_kernels.patching.core import Fused, Target, find_unexpected, hooks_of, is_plain
from mae_kernels.patching.mae import find_other_arguments, place_ids, removed_ids

LIBRARY = "transformers.models.vit_mae.modeling_vit_mae"

EMBEDDINGS_READ = {"patch_embeddings.projection": nn.Conv2d}
LAYER_READ = {"layernorm_after": nn.LayerNorm}
MLP_READ = {"fc1": nn.Linear, "fc2": nn.Linear}

# Arguments that ask an attention for nothing.
OBSERVED = {"output_hidden_states"}

# Fields of the outputs that are made here.
DECODER_FIELDS = ("logits", "hidden_states", "attentions")
MODEL_FIELDS = ("loss", "logits", "mask", "ids_restore", "hidden_states", "attentions")


def sized(like: Tensor, *shape: int) -> Tensor:
    """A tensor of which only the shape means something, in no memory."""
    return like.new_empty(1).expand(shape)


def output_class(module: Any) -> Any:
    """The class of what a module returns, as its forward tells."""
    return module.unfused_class.forward.__annotations__["return"]


def find_other_output(module: nn.Module, fields: tuple[str, ...]) -> str | None:
    """Say that a module does not return an output of these fields."""
    made = type(module).forward.__annotations__.get("return")
    known = getattr(made, "__dataclass_fields__", {})
    return None if tuple(known) == fields else f"its forward returns {made}, expected an output of {', '.join(fields)}"


def find_own(module: nn.Module, *methods: str) -> str | None:
    """Say which method, that the fused form would take for the library's, is not."""
    for name in methods:
        if getattr(type(module), name).__module__ != LIBRARY or name in vars(module):
            return f"{type(module).__name__} has a {name} of its own"
    return None


class FusedEmbeddings(Fused, nn.Module):
    """Embeddings of the visible patches alone."""

    def forward(
        self: Any, pixel_values: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> Any:
        """Embed ``(B, C, H, W)``; returns tokens with the class token first, the mask and ids_restore."""
        projection = self.patch_embeddings.projection
        batch, channels, height, width = pixel_values.shape
        size_fits = interpolate_pos_encoding or (height, width) == tuple(self.image_size)
        if not size_fits or channels != projection.in_channels or find_hidden_projection(self) is not None:
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        rows, columns = grid_shape((height, width), projection.kernel_size, projection.stride)
        position = self.position_embeddings
        if interpolate_pos_encoding:
            tokens = sized(position, batch, rows * columns, position.shape[2])
            position = self.interpolate_pos_encoding(tokens, height, width)
        kept, mask, ids_restore = self.random_masking(place_ids(batch, rows * columns, pixel_values.device), noise)
        tokens = patch_embed(
            pixel_values,
            kept[:, :, 0],
            projection.weight,
            projection.bias,
            position[0],
            self.cls_token,
            stride=projection.stride,
            impl=self.fused_impl,
        )
        return tokens, mask, ids_restore


def find_hidden_projection(embeddings: Any) -> str | None:
    """Say what is to run in or around the projection, which is read."""
    if any(hooks_of(embeddings.patch_embeddings)):
        return "patch_embeddings has hooks, which would not run"
    return find_unexpected(embeddings, EMBEDDINGS_READ)


def find_embeddings_refusal(embeddings: Any) -> str | None:
    """Why embeddings cannot be fused."""
    return find_own(embeddings.patch_embeddings, "forward") or find_hidden_projection(embeddings)


class FusedAttention(Fused, nn.Module):
    """Self-attention by the fastest library at hand."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Attend over all tokens of ``(B, N, D)``; returns the result and None for the weights."""
        asked = (name for name, value in kwargs.items() if value is not None and value is not False)
        other = self.config._attn_implementation != "sdpa" or not OBSERVED.issuperset(asked)
        if other or attention_mask is not None or (self.training and self.attention_dropout > 0):
            return super().forward(hidden_states, attention_mask, **kwargs)
        q, k, v = (
            projection(hidden_states).unflatten(2, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = flash_attention(q, k, v, scale=self.scaling, impl=self.fused_impl)
        return self.o_proj(out.flatten(2)), None


def find_attention_refusal(attention: Any) -> str | None:
    """Why an attention cannot be fused."""
    if attention.attention_dropout > 0:
        return f"attention_probs_dropout_prob is {attention.attention_dropout}, expected 0"
    implementation = attention.config._attn_implementation
    if implementation != "sdpa":
        return f"the attention implementation is {implementation!r}, expected 'sdpa'"
    return "it is causal" if attention.is_causal else None


class FusedMlp(Fused, nn.Module):
    """Linear, GELU, linear without the activation kept."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        """Run the MLP on ``(B, N, D)``."""
        fc1, fc2, activation = self.fc1, self.fc2, self.activation_fn
        if not (is_gelu(activation) and is_plain(fc1, nn.Linear) and is_plain(fc2, nn.Linear)):
            return super().forward(hidden_states)
        return mlp(hidden_states, fc1.weight, fc1.bias, fc2.weight, fc2.bias, impl=self.fused_impl)


def find_mlp_refusal(module: Any) -> str | None:
    """Why an MLP cannot be fused."""
    if any(hooks_of(module.activation_fn)):
        return "activation_fn has hooks, which would not run"
    if not is_gelu(module.activation_fn):
        return f"its activation is {type(module.activation_fn).__name__}, expected the exact GELU"
    return find_unexpected(module, MLP_READ) or find_missing_bias(module.fc1, module.fc2)


def is_gelu(activation: Any) -> bool:
    """Whether an activation is the exact GELU, and nothing else runs with it."""
    if type(activation) is nn.GELU:
        return activation.approximate == "none" and is_plain(activation, nn.GELU)
    return getattr(activation, "act", None) is F.gelu and is_plain(activation, type(activation))


def find_missing_bias(*parts: nn.Module) -> str | None:
    """Say that a part has no bias, which the operators need."""
    return "a part has no bias" if any(part.bias is None for part in parts) else None


class FusedLayer(Fused, nn.Module):
    """Pre-norm layer whose first addition and second norm are one."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the layer on ``(B, N, D)``."""
        norm = self.layernorm_after
        if not is_plain(norm, nn.LayerNorm):
            return super().forward(hidden_states, attention_mask, **kwargs)
        branch, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states, normed = add_layer_norm(
            self.dropout(branch), hidden_states, norm.weight, norm.bias, eps=norm.eps, impl=self.fused_impl
        )
        return self.dropout(self.mlp(normed)) + hidden_states


def find_layer_refusal(layer: Any) -> str | None:
    """Why a layer cannot be fused."""
    return find_unexpected(layer, LAYER_READ) or find_missing_bias(layer.layernorm_after)


class FusedDecoder(Fused, nn.Module):
    """Decoder whose input is written in one pass."""

    def forward(self: Any, hidden_states: Tensor, ids_restore: Tensor, interpolate_pos_encoding: bool = False) -> Any:
        """Predict all patches from the encoder's ``(B, 1 + K, D)``."""
        hidden_states = self.decoder_embed(hidden_states)
        position = self.decoder_pos_embed
        if interpolate_pos_encoding:
            batch, length = ids_restore.shape
            position = self.interpolate_pos_encoding(sized(hidden_states, batch, 1 + length, hidden_states.shape[2]))
        hidden_states = restore_tokens(
            hidden_states, ids_restore, self.mask_token, position[0], keep_cls=True, impl=self.fused_impl
        )
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        # The class token goes before the predictions, which are wider, so that these are written once.
        logits = self.decoder_pred(self.decoder_norm(hidden_states[:, 1:]))
        return output_class(self)(logits=logits)


def find_decoder_refusal(decoder: Any) -> str | None:
    """Why a decoder cannot be fused."""
    return find_other_output(decoder, DECODER_FIELDS) or find_unexpected(decoder, {"decoder_layers": nn.ModuleList})


class FusedPreTraining(Fused, nn.Module):
    """ViTMAE whose loss reads the removed patches alone."""

    def forward(
        self: Any,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Reconstruct ``(B, C, H, W)``."""
        if pixel_values is None or not can_score(self.config, pixel_values, interpolate_pos_encoding):
            return super().forward(pixel_values, noise, interpolate_pos_encoding, attention_mask, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        encoded = self.vit(
            pixel_values,
            noise=noise,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )
        decoded = self.decoder(
            encoded.last_hidden_state, encoded.ids_restore, interpolate_pos_encoding=interpolate_pos_encoding
        )
        removed = encoded.ids_restore.shape[1] + 1 - encoded.last_hidden_state.shape[1]
        loss = masked_mse(
            decoded.logits,
            pixel_values,
            removed_ids(encoded.mask, removed),
            patch_size=self.config.patch_size,
            normalize=self.config.norm_pix_loss,
            impl=self.fused_impl,
        )
        output = output_class(self)(
            loss=loss,
            logits=decoded.logits,
            mask=encoded.mask,
            ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output


def can_score(config: Any, pixel_values: Tensor, interpolate_pos_encoding: bool | None) -> bool:
    """Whether the library cuts these images into targets, all of them whole, and any is removed."""
    if config.mask_ratio <= 0:
        return False
    _, channels, height, width = pixel_values.shape
    whole = height % config.patch_size == 0 and width % config.patch_size == 0
    return whole and channels == config.num_channels and bool(interpolate_pos_encoding or height == width)


def find_model_refusal(model: Any) -> str | None:
    """Why a model cannot be fused."""
    if not isinstance(model.config.patch_size, int):
        return f"config.patch_size is {model.config.patch_size}, expected an int"
    return (
        find_own(model, "patchify")
        or find_own(model.vit.embeddings, "random_masking")
        or find_other_output(model, MODEL_FIELDS)
    )


def target(name: str, fusion: type[Fused], find_refusal: Callable[[Any], str | None], *operators: str) -> Target:
    """The target of one of the library's classes."""

    def refuse(module: nn.Module) -> str | None:
        return find_other_arguments(type(module), fusion, ["forward"]) or find_refusal(module)

    return Target(f"{LIBRARY}.{name}", fusion, operators, refuse)


TARGETS: tuple[Target, ...] = (
    target("ViTMAEForPreTraining", FusedPreTraining, find_model_refusal, "masked_mse"),
    target("ViTMAEEmbeddings", FusedEmbeddings, find_embeddings_refusal, "patch_embed"),
    target("ViTMAEDecoder", FusedDecoder, find_decoder_refusal, "restore_tokens"),
    target("ViTMAELayer", FusedLayer, find_layer_refusal, "add_layer_norm"),
    target("ViTMAEAttention", FusedAttention, find_attention_refusal, "flash_attention"),
    target("ViTMAEMLP", FusedMlp, find_mlp_refusal, "mlp"),
)

"""The fine-tuned classifier written down from the paper: the truth that the project's classifier is tested against.

Plain functions on a dictionary of tensors under the official parameter names, written without the model's code. The
encoder's block is that of ``transcription``; everything is computed in float64.

Sources: "Masked Autoencoders that Listen" (arXiv 2207.06405, section 3) and MAE (arXiv 2111.06377); ViT
(arXiv 2010.11929) for patches, class token, positions and the pre-norm block; for names and shapes, timm 0.3's
``VisionTransformer``, whose final ``norm`` the official classifier replaces by ``fc_norm`` after the mean over patches.
The tests compare all of it with today's timm.

B clips of L patches, K of them kept; encoder width D; patches of ph frames x pw mel bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .transcription import Params, global_block, layer_norm, linear


def official_classifier_state(
    seed: int,
    *,
    depth: int,
    dim: int,
    heads: int,
    mlp_ratio: float,
    grid: tuple[int, int],
    patch: tuple[int, int] = (16, 16),
    classes: int,
) -> Params:
    """Random float32 tensors under the names and in the shapes of an official fine-tuned checkpoint's "model".

    Nothing is zero or one that training would move from there: biases, norms, positions and the class token neither.
    Linear weights keep the size of what goes through them.

    Args:
        seed: Of all values.
        depth: Blocks.
        dim: D.
        heads: Attention heads; names and shapes do not show them.
        mlp_ratio: Width of the MLP over D.
        grid: Numbers of patches along (time, mel).
        patch: (ph, pw).
        classes: Outputs of the head.

    Raises:
        ValueError: The heads do not divide D.
    """
    if dim % heads:
        raise ValueError(f"{heads} heads do not divide dim {dim}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    def linear_state(name: str, inputs: int, outputs: int) -> Params:
        weight = normal(outputs, inputs, std=1 / math.sqrt(inputs))
        return {f"{name}.weight": weight, f"{name}.bias": normal(outputs, std=0.3)}

    def norm_state(name: str) -> Params:
        return {f"{name}.weight": normal(dim, mean=1.0, std=0.3), f"{name}.bias": normal(dim, std=0.3)}

    hidden = int(dim * mlp_ratio)
    state = {
        "cls_token": normal(1, 1, dim),
        "pos_embed": normal(1, 1 + math.prod(grid), dim),
        "patch_embed.proj.weight": normal(dim, 1, *patch, std=1 / math.sqrt(math.prod(patch))),
        "patch_embed.proj.bias": normal(dim, std=0.3),
    }
    for block in (f"blocks.{i}" for i in range(depth)):
        state |= norm_state(f"{block}.norm1")
        state |= linear_state(f"{block}.attn.qkv", dim, 3 * dim)
        state |= linear_state(f"{block}.attn.proj", dim, dim)
        state |= norm_state(f"{block}.norm2")
        state |= linear_state(f"{block}.mlp.fc1", dim, hidden)
        state |= linear_state(f"{block}.mlp.fc2", hidden, dim)
    return state | norm_state("fc_norm") | linear_state("head", dim, classes)


def classifier_logits(state: Params, spec: Tensor, heads: int, ids_keep: Tensor | None = None) -> Tensor:
    """Logits (B, classes) in float64 of normalised spectrograms (B, 1, T, F), without drop path.

    Token t * (patches along mel) + f is the patch of frames t * ph ... and mel bins f * pw ... . It gets its own
    position before any is dropped; row 0 of the positions is the class token's, which is never dropped and takes part
    in attention but not in the mean.

    Args:
        state: As of :func:`official_classifier_state`.
        spec: T and F are multiples of ph and pw.
        heads: Attention heads.
        ids_keep: (B, K), the tokens of each clip that go in; None for all.

    Raises:
        ValueError: Spectrograms that do not have as many whole patches as there are positions.
    """
    params = {name: tensor.double() for name, tensor in state.items()}
    kernel = params["patch_embed.proj.weight"]  # (D, 1, ph, pw)
    ph, pw = kernel.shape[2:]
    frames, mels = spec.shape[2:]
    positions = params["pos_embed"][0]
    if frames % ph or mels % pw or 1 + (frames // ph) * (mels // pw) != len(positions):
        raise ValueError(f"{frames} x {mels} values do not make {len(positions) - 1} patches of {ph} x {pw}")

    tokens = []
    for t in range(frames // ph):
        for f in range(mels // pw):
            patch = spec[:, 0, t * ph : (t + 1) * ph, f * pw : (f + 1) * pw].double()
            projected = (patch[:, None] * kernel[:, 0]).sum(dim=(2, 3))  # (B, D)
            tokens.append(projected + params["patch_embed.proj.bias"] + positions[1 + len(tokens)])
    cls = params["cls_token"][0, 0] + positions[0]

    clips = []
    for b in range(len(spec)):
        kept = range(len(tokens)) if ids_keep is None else ids_keep[b].tolist()
        clips.append(torch.stack([cls, *(tokens[token][b] for token in kept)]))
    x = torch.stack(clips)  # (B, 1 + K, D)
    depth = sum(name.endswith(".norm1.weight") for name in params)
    for i in range(depth):
        x = global_block(params, f"blocks.{i}", x, heads)
    pooled = x[:, 1:].sum(dim=1) / (x.shape[1] - 1)
    return linear(params, "head", layer_norm(params, "fc_norm", pooled))

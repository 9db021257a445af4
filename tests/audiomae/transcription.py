"""Audio-MAE written down from the paper, token by token: the truth that the project's model is tested against.

Plain functions on a dictionary of tensors under the official parameter names, written without the model's code or its
tricks: patches are cut one at a time, heads are loops, and the pairs of tokens that share a shifted window are found by
integer arithmetic. Gradients come from autograd, so run it in float64.

Sources: "Masked Autoencoders that Listen" (arXiv 2207.06405), MAE (arXiv 2111.06377), and for the local block Swin V2
(arXiv 2111.09883). B clips of L patches, K of them kept; encoder width D, decoder Dd; P = ph * pw * C values a patch.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from audiomae import AudioMAEConfig

Params = dict[str, Tensor]

DEFAULT_DECODER_DEPTH = {"local": 16, "hybrid": 12, "global": 8}


def token_grid(config: AudioMAEConfig) -> tuple[int, int]:
    """Numbers of patches along (time, mel): every start at a multiple of the stride from which a whole patch fits."""
    (rows, columns), (ph, pw), (sh, sw) = config.spec_size, config.patch_size, config.patch_stride
    return len(range(0, rows - ph + 1, sh)), len(range(0, columns - pw + 1, sw))


def cut_patches(config: AudioMAEConfig, spec: Tensor) -> list[Tensor]:
    """The L patches (B, C, ph, pw) of spec (B, C, T, F), time-major, mel fastest."""
    times, mels = token_grid(config)
    (ph, pw), (sh, sw) = config.patch_size, config.patch_stride
    return [spec[:, :, t * sh : t * sh + ph, f * sw : f * sw + pw] for t in range(times) for f in range(mels)]


def patch_vector(patch: Tensor) -> Tensor:
    """A patch (B, C, ph, pw) as the vector (B, P) that the decoder predicts: by row, by column, channel fastest."""
    return torch.cat([patch[:, :, p, q] for p in range(patch.shape[2]) for q in range(patch.shape[3])], dim=1)


def sine_cosine(dim: int, grid: tuple[int, int], transposed: bool = False) -> Tensor:
    """Fixed positions (1 + L, dim) in float64, the class token's zeros first.

    The channels' quarters hold sin and cos of the mel index, then sin and cos of the time index, at angular frequencies
    that fall from 1 towards 1/10000. ``transposed`` is the released code's slip: it numbers the same tokens along a
    (mel, time) grid, row after row.
    """
    times, mels = grid
    quarter = dim // 4
    table = torch.zeros(1 + times * mels, dim, dtype=torch.float64)
    for token in range(times * mels):
        columns = times if transposed else mels
        row, column = divmod(token, columns)
        for k in range(quarter):
            frequency = 10000.0 ** (-k / quarter)
            for part, coordinate in enumerate((column, row)):
                start = 2 * part * quarter
                table[1 + token, start + k] = math.sin(coordinate * frequency)
                table[1 + token, start + quarter + k] = math.cos(coordinate * frequency)
    return table


def kept_patches(strategy: str, grid: tuple[int, int], *ratios: float) -> int:
    """Number of patches kept: int() of a float product, rounding included; whole rows and columns if structured."""
    times, mels = grid
    match strategy:
        case "random":
            return int(times * mels * (1 - ratios[0]))
        case "time":
            return int(times * (1 - ratios[0])) * mels
        case "frequency":
            return times * int(mels * (1 - ratios[0]))
        case "time_frequency":
            return int(times * (1 - ratios[0])) * int(mels * (1 - ratios[1]))
    raise ValueError(f"unknown strategy {strategy!r}")


def mask_from_noise(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Random masking of noise (B, L) without ties: the smallest values are kept, in ascending order.

    Returns:
        ids_keep (B, K), ids_restore (B, L): the place of a patch in that order, mask (B, L): True where removed.
    """
    batch, length = noise.shape
    keep = kept_patches("random", (length, 1), ratio)
    ids_keep = torch.empty(batch, keep, dtype=torch.int64)
    ids_restore = torch.empty(batch, length, dtype=torch.int64)
    for b in range(batch):
        for token in range(length):
            rank = int((noise[b] < noise[b, token]).sum())
            ids_restore[b, token] = rank
            if rank < keep:
                ids_keep[b, rank] = token
    return ids_keep, ids_restore, ids_restore >= keep


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def layer_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """LayerNorm over the last axis with the biased variance and eps 1e-6."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6) * params[f"{name}.weight"] + params[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """Exact GELU: x times the normal distribution's cumulative function."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mlp(params: Params, name: str, x: Tensor) -> Tensor:
    """Linear, GELU, linear."""
    return linear(params, f"{name}.fc2", gelu(linear(params, f"{name}.fc1", x)))


def split_heads(qkv: Tensor, heads: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v), each (B, N, dim), of every head from qkv (B, N, 3D) laid out [q | k | v][head][dim]."""
    width = qkv.shape[-1] // 3
    dim = width // heads

    def part(which: int, head: int) -> Tensor:
        start = which * width + head * dim
        return qkv[..., start : start + dim]

    return [(part(0, head), part(1, head), part(2, head)) for head in range(heads)]


def attend(logits: Tensor, values: Tensor) -> Tensor:
    """Softmax over keys of logits (B, N, N), then the weighted sum of values (B, N, dim)."""
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    return weights @ values / weights.sum(dim=-1, keepdim=True)


def global_block(params: Params, name: str, x: Tensor, heads: int) -> Tensor:
    """Pre-norm ViT block over all tokens x (B, N, D)."""
    outputs = []
    for q, k, v in split_heads(linear(params, f"{name}.attn.qkv", layer_norm(params, f"{name}.norm1", x)), heads):
        outputs.append(attend(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), v))
    x = x + linear(params, f"{name}.attn.proj", torch.cat(outputs, dim=-1))
    return x + mlp(params, f"{name}.mlp", layer_norm(params, f"{name}.norm2", x))


@cache
def window_pairs(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every ordered pair of tokens that shares a window after the cyclic shift.

    An axis that one window covers has one window of its own size and no shift. Any other axis is padded at its end up
    to a multiple of the window, and the shift rolls the padded axis; padding belongs to no pair.

    Returns:
        query and key tokens (N,), offsets (N, 2) query - key inside the window along (time, mel), and seam (N,): True
        where the roll brought the two together from different sides.
    """

    def places(size: int, window: int, shift: int) -> list[tuple[int, int, bool]]:
        """(window, place in it, whether the roll carried it from the start to the end) of every index of one axis."""
        if size <= window:
            window, shift = size, 0
        padded = -(-size // window) * window
        rolled = [(index - shift) % padded for index in range(size)]
        return [(place // window, place % window, index < shift) for index, place in enumerate(rolled)]

    rows, columns = (places(*axis) for axis in zip(grid, window, shift, strict=True))
    tokens = [(row, column) for row in rows for column in columns]
    queries, keys, offsets, seams = [], [], [], []
    for i, (row_i, column_i) in enumerate(tokens):
        for j, (row_j, column_j) in enumerate(tokens):
            if row_i[0] == row_j[0] and column_i[0] == column_j[0]:
                queries.append(i)
                keys.append(j)
                offsets.append((row_i[1] - row_j[1], column_i[1] - column_j[1]))
                seams.append(row_i[2] != row_j[2] or column_i[2] != column_j[2])
    return torch.tensor(queries), torch.tensor(keys), torch.tensor(offsets), torch.tensor(seams)


def local_block(
    params: Params,
    name: str,
    x: Tensor,
    heads: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
) -> Tensor:
    """Post-norm Swin V2 block over x (B, L, Dd): windowed cosine attention, log-spaced continuous position bias."""
    queries, keys, offsets, seam = window_pairs(grid, window, shift)
    offsets = offsets.to(x.dtype)
    hidden = torch.relu(linear(params, f"{name}.attn.meta_mlp.fc1", torch.sign(offsets) * torch.log(1 + offsets.abs())))
    pair_bias = linear(params, f"{name}.attn.meta_mlp.fc2", hidden) - 100.0 * seam[:, None]
    outputs = []
    for head, (q, k, v) in enumerate(split_heads(linear(params, f"{name}.attn.qkv", x), heads)):
        lengths = torch.linalg.vector_norm(q, dim=-1)[:, :, None] * torch.linalg.vector_norm(k, dim=-1)[:, None, :]
        cosine = q @ k.transpose(1, 2) / lengths.clamp(min=1e-6)
        bias = torch.full(cosine.shape[1:], -math.inf, dtype=x.dtype).index_put((queries, keys), pair_bias[:, head])
        outputs.append(attend(cosine / params[f"{name}.attn.tau"][head].clamp(min=0.01) + bias, v))
    attended = linear(params, f"{name}.attn.proj", torch.cat(outputs, dim=-1))
    x = x + layer_norm(params, f"{name}.norm1", attended)
    return x + layer_norm(params, f"{name}.norm2", mlp(params, f"{name}.mlp", x))


def encode(params: Params, config: AudioMAEConfig, spec: Tensor, ids_keep: Tensor) -> Tensor:
    """Encoder output (B, 1 + K, D) of spec (B, C, T, F): class token, then the patches ids_keep (B, K) in its order."""
    weight = params["patch_embed.proj.weight"]
    tokens = []
    for token, patch in enumerate(cut_patches(config, spec)):
        projected = torch.einsum("bcpq,dcpq->bd", patch, weight) + params["patch_embed.proj.bias"]
        tokens.append(projected + params["pos_embed"][0, 1 + token])
    patches = torch.stack(tokens, dim=1)
    cls = params["cls_token"][0, 0] + params["pos_embed"][0, 0]
    x = torch.stack([torch.stack([cls, *clip[ids]]) for clip, ids in zip(patches, ids_keep, strict=True)])
    for i in range(config.depth):
        x = global_block(params, f"blocks.{i}", x, config.num_heads)
    return layer_norm(params, "norm", x)


def decode(params: Params, config: AudioMAEConfig, latent: Tensor, ids_restore: Tensor) -> Tensor:
    """Predictions (B, L, P) of all patches from the encoder's output (B, 1 + K, D)."""
    grid = token_grid(config)
    embedded = linear(params, "decoder_embed", latent)
    mask_token = params["mask_token"][0, 0]
    rows = []
    for clip, restore in zip(embedded, ids_restore.tolist(), strict=True):
        kept = clip[1:]
        rows.append(torch.stack([clip[0], *(kept[rank] if rank < len(kept) else mask_token for rank in restore)]))
    x = torch.stack(rows) + params["decoder_pos_embed"]

    depth = config.decoder_depth or DEFAULT_DECODER_DEPTH[config.decoder]
    global_blocks = {"local": 0, "hybrid": config.hybrid_global_layers, "global": depth}[config.decoder]
    if config.decoder != "global":
        x = x[:, 1:]
    for i in range(depth):
        name = f"decoder_blocks.{i}"
        if i >= depth - global_blocks:
            x = global_block(params, name, x, config.decoder_heads)
        else:
            shift = config.shift if i % 2 else (0, 0)
            x = local_block(params, name, x, config.decoder_heads, grid, config.window, shift)
    if config.decoder == "global":
        x = x[:, 1:]
    return linear(params, "decoder_pred", layer_norm(params, "decoder_norm", x))


def reconstruction_loss(config: AudioMAEConfig, spec: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over all values of the removed patches, normalised with the unbiased variance if asked."""
    target = torch.stack([patch_vector(patch) for patch in cut_patches(config, spec)], dim=1)
    if config.norm_target:
        centred = target - target.mean(dim=-1, keepdim=True)
        variance = (centred * centred).sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
        target = centred / torch.sqrt(variance + 1e-6)
    return ((pred - target)[mask] ** 2).mean()


def mae_forward(
    params: Params, config: AudioMAEConfig, spec: Tensor, ids_keep: Tensor, ids_restore: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and predictions (B, L, P) of spec (B, C, T, F) under ids_keep (B, K), ids_restore (B, L) and mask (B, L)."""
    pred = decode(params, config, encode(params, config, spec, ids_keep), ids_restore)
    return reconstruction_loss(config, spec, pred, mask), pred

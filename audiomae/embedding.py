"""Embeddings of audio: what an encoder makes of a clip and of each of its time steps, for any length and sample rate.

A model hears a fixed number of frames, so audio is cut into :class:`audiomae.windows.Windows`. As in training, each
window loses its own mean and is padded, which tokens attend to; the embeddings of padding itself are dropped.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from audiomae.config import EncoderConfig
from audiomae.encoder import Encoder
from audiomae.windows import Windows


class Embedding(NamedTuple):
    """Embeddings of a batch of clips, or of one without the leading axis.

    Attributes:
        clip: ``(B, D)``, the mean of ``frames``.
        frames: ``(B, N, D)``, one for each time step of the patch grid: the mean of its tokens over all frequencies.
        times: ``(N,)`` float64 on the CPU, the centre of each time step in seconds.
    """

    clip: Tensor
    frames: Tensor
    times: Tensor


class WindowEmbedder:
    """Embeds the time steps of a batch of windows.

    Args:
        config: Of the encoder and its input.
        encoder: Used where it is and left as it is. Nothing in it differs in training.
        layer: Whose output to take: 1 is the residual stream after the first block, -1 after the last. None is what
            the encoder returns: the stream after the last block and the final norm, or without a norm, as in a
            classifier, which pools the stream before its norm.

    Raises:
        ValueError: No such layer, or an encoder of several channels.
    """

    def __init__(self, config: EncoderConfig, encoder: Encoder, layer: int | None = None):
        depth = len(encoder.blocks)
        if layer is not None and (layer == 0 or abs(layer) > depth):
            raise ValueError(f"layer is {layer}, expected 1 to {depth}, or -{depth} to -1 from the last one back")
        if config.in_channels != 1:
            raise ValueError(f"the encoder hears {config.in_channels} channels, expected 1: a waveform is one")
        self.encoder, self.layer = encoder, layer
        self.windows = Windows.of(config)
        self.device, self._encoder_dtype = encoder.pos_embed.device, encoder.pos_embed.dtype
        self.dtype = torch.promote_types(self._encoder_dtype, torch.float32)
        self.dim = config.embed_dim
        self._frames, self._grid_shape = config.spec_size[0], config.grid.shape
        self._front_end = config.front_end().to(self.device)

    @torch.no_grad()
    def __call__(self, windows: Tensor, lengths: Tensor) -> Tensor:
        """Embed all time steps, those of padding included.

        Args:
            windows: ``(B, self.windows.samples)`` on any device.
            lengths: ``(B,)`` int64 on the CPU, theirs without padding.

        Returns:
            ``(B, self.windows.steps, self.dim)`` in ``self.dtype``: the encoder's, at least float32.
        """
        windows = windows.to(self.dtype).to(self.device)
        spec = self._front_end(windows, self._frames, lengths).to(self._encoder_dtype)
        if self.layer is None:
            tokens = self.encoder(spec)
        else:
            tokens = self.encoder.hidden_states(spec)[self.layer - (self.layer > 0)]
        return tokens[:, 1:].unflatten(1, self._grid_shape).mean(dim=2, dtype=self.dtype)


@torch.no_grad()
def embed(
    config: EncoderConfig,
    encoder: Encoder,
    waveform: Tensor | np.ndarray,
    sample_rate: int,
    *,
    layer: int | None = None,
    batch_size: int = 16,
) -> Embedding:
    """Embed audio of any length and sample rate.

    Args:
        config: Of the encoder and its input.
        encoder: Computes where it is, and is left as it is.
        waveform: ``(samples,)``, or ``(B, samples)`` for clips of one length; floating point, full scale at 1. The two
            channels of a stereo clip count as two clips: average them first for an embedding of what is in both.
        sample_rate: Of the waveform, Hz.
        layer: As for :class:`WindowEmbedder`.
        batch_size: Windows at a time. What the encoder takes of memory depends on it, not on the length.

    Returns:
        Embeddings on the encoder's device, without gradients, in its dtype, or float32 if that is a smaller one.

    Raises:
        TypeError: A waveform of integers.
        ValueError: No such layer, a waveform of another shape, without samples, or with samples that are not finite, or
            a setting out of range.
    """
    embedder = WindowEmbedder(config, encoder, layer)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    waveform = _checked(torch.as_tensor(waveform), sample_rate)
    clips = resample(torch.atleast_2d(waveform).to(embedder.dtype), int(sample_rate), config.sample_rate)
    steps = embedder.windows.num_steps(clips.shape[1])
    windows, lengths = embedder.windows.cut(clips)
    count = windows.shape[1]
    frames = torch.empty(
        len(clips) * count, embedder.windows.steps, embedder.dim, dtype=embedder.dtype, device=embedder.device
    )
    for start in range(0, len(frames), batch_size):
        batch = torch.arange(start, min(start + batch_size, len(frames)))
        clip, window = batch // count, batch % count
        frames[batch] = embedder(windows[clip, window], lengths[window])
    frames = frames.view(len(clips), count * embedder.windows.steps, embedder.dim)[:, :steps]
    frames = frames if waveform.dim() == 2 else frames[0]
    return Embedding(frames.mean(dim=-2), frames, embedder.windows.times(steps))


def _checked(waveform: Tensor, sample_rate: int) -> Tensor:
    if waveform.dim() not in (1, 2):
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}, expected (samples,) or (B, samples)")
    if not waveform.shape[-1]:
        raise ValueError("waveform holds no samples")
    if len(waveform) > waveform.shape[-1]:  # frames and channels, as libraries read files
        raise ValueError(
            f"waveform has shape {tuple(waveform.shape)}: expected (B, samples), not more clips than samples"
        )
    if not waveform.is_floating_point():
        raise TypeError(f"waveform is {waveform.dtype}, expected floating point with full scale at 1")
    if not sample_rate >= 1 or sample_rate % 1:
        raise ValueError(f"sample_rate is {sample_rate}, expected whole Hz from 1 up")
    if not waveform.isfinite().all():
        raise ValueError("waveform holds samples that are not finite")
    return waveform

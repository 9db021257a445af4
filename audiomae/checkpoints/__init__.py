"""Weights in and out: native, official Audio-MAE, timm and image-MAE files.

Use :func:`load_model` for a whole model, :func:`start_encoder` to begin from an encoder of any origin, :func:`load` for
the configuration and tensors alone, :func:`save_weights` and :func:`save_official` to write; the ``from_`` and ``to_``
functions rename dictionaries in memory.
"""

from audiomae.checkpoints.files import NATIVE_CONFIG, NATIVE_METADATA, NATIVE_MODEL, CheckpointError
from audiomae.checkpoints.loading import load, load_model, start_encoder
from audiomae.checkpoints.names import from_official, from_timm, to_official, to_timm
from audiomae.checkpoints.saving import save_official, save_weights

__all__ = [
    "NATIVE_CONFIG",
    "NATIVE_METADATA",
    "NATIVE_MODEL",
    "CheckpointError",
    "from_official",
    "from_timm",
    "load",
    "load_model",
    "save_official",
    "save_weights",
    "start_encoder",
    "to_official",
    "to_timm",
]

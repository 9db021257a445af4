"""Weights in and out: native, official Audio-MAE, timm and image-MAE files.

Use :func:`load_model` for a whole pre-training model, :func:`load_classifier` for a fine-tuned one and
:func:`load_encoder` for the encoder of either; :func:`start_encoder` and :func:`start_classifier` to begin from weights
of any origin; :func:`load` for the configuration and tensors alone; :func:`save_weights` and :func:`save_official` to
write. The ``from_`` and ``to_`` functions rename dictionaries in memory; :func:`to_timm` also makes a model.
"""

from audiomae.checkpoints.files import NATIVE_CONFIG, NATIVE_METADATA, NATIVE_MODEL, CheckpointError
from audiomae.checkpoints.loading import (
    load,
    load_classifier,
    load_classifier_or_encoder,
    load_encoder,
    load_model,
    start_classifier,
    start_encoder,
)
from audiomae.checkpoints.names import from_official, from_timm, to_official
from audiomae.checkpoints.saving import save_official, save_weights
from audiomae.checkpoints.timm_model import to_timm

__all__ = [
    "NATIVE_CONFIG",
    "NATIVE_METADATA",
    "NATIVE_MODEL",
    "CheckpointError",
    "from_official",
    "from_timm",
    "load",
    "load_classifier",
    "load_classifier_or_encoder",
    "load_encoder",
    "load_model",
    "save_official",
    "save_weights",
    "start_classifier",
    "start_encoder",
    "to_official",
    "to_timm",
]

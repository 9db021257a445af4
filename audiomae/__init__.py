"""Audio-MAE: pre-train, fine-tune and use masked autoencoders that listen."""

from audiomae.classifier import AudioClassifier, AudioClassifierConfig
from audiomae.config import EncoderConfig
from audiomae.frontend import LogMel
from audiomae.grid import PatchGrid
from audiomae.masking import PatchMask
from audiomae.model import AudioMAE, AudioMAEConfig, MAEOutput

__version__ = "0.1.0"

__all__ = [
    "AudioClassifier",
    "AudioClassifierConfig",
    "AudioMAE",
    "AudioMAEConfig",
    "EncoderConfig",
    "LogMel",
    "MAEOutput",
    "PatchGrid",
    "PatchMask",
]

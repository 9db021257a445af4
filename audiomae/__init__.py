"""Audio-MAE: pre-train, fine-tune and use masked autoencoders that listen."""

from audiomae.frontend import LogMel
from audiomae.grid import PatchGrid
from audiomae.masking import PatchMask
from audiomae.model import AudioMAE, AudioMAEConfig, MAEOutput

__version__ = "0.1.0"

__all__ = ["AudioMAE", "AudioMAEConfig", "LogMel", "MAEOutput", "PatchGrid", "PatchMask"]

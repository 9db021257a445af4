"""Audio in: manifests, clip reading, and the batches of a run."""

from audiomae.data.clips import ClipDataset, ClipError, read_waveform
from audiomae.data.manifests import Manifest, ManifestError, read_manifest
from audiomae.data.sampling import ClipBatches

__all__ = ["ClipBatches", "ClipDataset", "ClipError", "Manifest", "ManifestError", "read_manifest", "read_waveform"]

"""Audio in: manifests, labels, data sets, clip reading, and the batches of a run."""

from audiomae.data.clips import ClipDataset, ClipError, read_waveform
from audiomae.data.handover import ClipLoader
from audiomae.data.labels import LabelError, Labels, read_labels
from audiomae.data.manifests import Manifest, ManifestError, read_manifest
from audiomae.data.replacing import Batch, Replacing, Unread, collate_visits
from audiomae.data.sampling import ClipBatches

__all__ = [
    "Batch",
    "ClipBatches",
    "ClipDataset",
    "ClipError",
    "ClipLoader",
    "LabelError",
    "Labels",
    "Manifest",
    "ManifestError",
    "Replacing",
    "Unread",
    "collate_visits",
    "read_labels",
    "read_manifest",
    "read_waveform",
]

"""Audio in: manifests, labels, data sets, clip reading, and the batches of a run."""

from audiomae.data.clips import ClipDataset, read_waveform
from audiomae.data.handover import ClipLoader
from audiomae.data.labels import LabelError, Labels, read_labels
from audiomae.data.log_mel_stats import Stats, StatsError, read_stats
from audiomae.data.manifests import Manifest, ManifestError, read_manifest
from audiomae.data.replacing import Batch, Replacing, Unread, collate_visits
from audiomae.data.sampling import ClipBatches
from audiomae.data.sound_files import ClipError

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
    "Stats",
    "StatsError",
    "Unread",
    "collate_visits",
    "read_labels",
    "read_manifest",
    "read_stats",
    "read_waveform",
]

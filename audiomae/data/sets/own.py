"""Lists of one's own, and the demo clips."""

import os
from pathlib import Path

from audiomae.data.labels import LabelError, Labels, read_labels
from audiomae.data.manifests import Manifest, ManifestError, audio_files, read_manifest
from audiomae.data.sets.task import Part, Request, Survey, Task

_HELD_OUT = 3  # every so-manieth demo clip of a class


def survey_manifest(request: Request) -> Survey:
    """Read the lists that are given; no file is looked for.

    Raises:
        FileNotFoundError: No such list, folder, or label file.
        ManifestError: A malformed list or label file, a list that names a file outside its folder, or clips without
            labels.
    """
    sources = {"train": request.root, "valid": request.valid, "test": request.test}
    parts = tuple(
        Part(name, read_labelled(source, allow_outside=request.allow_outside), looked_for=False)
        for name, source in sources.items()
        if source is not None
    )
    manifests = [part.manifest for part in parts if part.manifest is not None]
    labels = Labels.of(*manifests) if request.labels is None else read_labels(request.labels)
    return Survey(request, labels, parts)


def read_labelled(source: Path, *, allow_outside: bool = False) -> Manifest:
    """Read a list; the first-level sub-folders of a folder are the classes of the clips in them.

    Args:
        source: A folder, or anything else that ``read_manifest`` takes.
        allow_outside: Whether a list may name files outside its folder.

    Raises:
        FileNotFoundError: No such list or folder.
        ManifestError: A malformed list, one that names a file outside its folder, or clips without labels.
    """
    if not source.is_dir():
        manifest = read_manifest(source, allow_outside=allow_outside)
        if not manifest.has_labels:
            raise LabelError(
                f"{source}: clips have no labels, expected a column label or labels, or labels in the JSON"
            )
        return manifest
    paths = audio_files(source)
    if not paths:
        raise ManifestError(f"{source}: no audio files below it, expected a folder for each class")
    for path in paths:
        if os.sep not in path:
            raise LabelError(f"{source}: {path} lies beside the folders of the classes, expected every clip in one")
    return Manifest(((path, (path.partition(os.sep)[0],)) for path in paths), root=source)


def build_manifest(found: Survey) -> Task:
    """Take the lists as they are; errors as for ``Survey.task``."""
    manifests = {part.name: part.manifest for part in found.parts}
    return found.task(found.clips("train"), manifests.get("valid"), manifests.get("test"))


def survey_demo(request: Request) -> Survey:
    """Split the demo clips: of each class, in order, every third one validates and the others train."""
    manifest = read_manifest()
    seen: dict[str, int] = {}
    held_out = []
    for clip in range(len(manifest)):
        (label,) = manifest.labels(clip)
        seen[label] = seen.get(label, 0) + 1
        if seen[label] % _HELD_OUT == 0:
            held_out.append(clip)
    train = sorted(set(range(len(manifest))) - set(held_out))
    parts = (Part("train", manifest.select(train)), Part("valid", manifest.select(held_out)))
    return Survey(request, Labels.of(manifest), parts)


def build_demo(found: Survey) -> Task:
    """Take the split as it is."""
    note = (
        "every third clip of a class validates; neighbours are often variants of one sound, so the figure is high for "
        "so small a set, and there is no test split"
    )
    return found.task(found.clips("train"), found.clips("valid"), notes=[note])

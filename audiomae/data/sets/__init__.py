"""Labelled data sets in their published layouts, as splits to train and evaluate on. Nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from audiomae.data.manifests import ManifestError
from audiomae.data.sets import audioset, esc50, own, speech_commands, voxceleb
from audiomae.data.sets.own import read_labelled
from audiomae.data.sets.task import Part, Request, Survey, Task

__all__ = [
    "DATA_SETS",
    "ESC50_FOLDS",
    "DataSet",
    "Part",
    "Request",
    "Survey",
    "Task",
    "read_labelled",
    "read_task",
    "survey",
]

ESC50_FOLDS = esc50.FOLDS


@dataclass(frozen=True)
class DataSet:
    """How a data set is read.

    Attributes:
        title: What people call it.
        survey: Finds out what is at hand.
        build: Makes the task of that.
        options: Arguments of ``read_task`` that it takes.
        needs_root: Whether it lies in a folder of the user's.
    """

    title: str
    survey: Callable[[Request], Survey]
    build: Callable[[Survey], Task]
    options: frozenset[str] = frozenset()
    needs_root: bool = True


_LISTS = frozenset({"labels", "valid", "test"})

DATA_SETS: dict[str, DataSet] = {
    "audioset": DataSet("AudioSet", audioset.survey, audioset.build, _LISTS),
    "audioset-20k": DataSet("AudioSet, balanced training clips", audioset.survey, audioset.build, _LISTS),
    "esc50": DataSet("ESC-50", esc50.survey, esc50.build, frozenset({"fold"})),
    "speech-commands-v1": DataSet(
        "Speech Commands v1, 12 classes", speech_commands.survey_v1, speech_commands.build_v1
    ),
    "speech-commands-v2": DataSet("Speech Commands v2, 35 words", speech_commands.survey_v2, speech_commands.build_v2),
    "voxceleb1": DataSet("VoxCeleb1, identification", voxceleb.survey, voxceleb.build),
    "demo": DataSet("demo clips", own.survey_demo, own.build_demo, needs_root=False),
    "manifest": DataSet("own lists", own.survey_manifest, own.build_manifest, _LISTS),
}
"""Data sets by name."""


def survey(
    name: str,
    root: str | Path | None,
    *,
    fold: int | None = None,
    labels: str | Path | None = None,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    seed: int = 0,
    allow_outside: bool = False,
) -> Survey:
    """Find out what of a data set is at hand; arguments and errors as for ``read_task``."""
    if name not in DATA_SETS:
        raise ManifestError(f"data set is {name!r}, expected one of {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    if data_set.needs_root != (root is not None):
        expected = (
            "the folder or list that it lies in" if data_set.needs_root else "none: its clips come with the package"
        )
        raise ManifestError(f"data of {name} is {root}, expected {expected}")
    for option, value in {"fold": fold, "labels": labels, "valid": valid, "test": test}.items():
        if value is not None and option not in data_set.options:
            raise ManifestError(f"{option} is {value}, but {name} takes none")
    labels, valid, test = (None if path is None else Path(path) for path in (labels, valid, test))
    return data_set.survey(Request(name, Path(root or ""), fold, labels, valid, test, seed, allow_outside))


def read_task(
    name: str,
    root: str | Path | None,
    *,
    fold: int | None = None,
    labels: str | Path | None = None,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    seed: int = 0,
    allow_outside: bool = False,
) -> Task:
    """Read a labelled data set; no clip is opened, but for the recordings of noise of Speech Commands v1.

    Clips that are listed and not at hand are left out, and the task's notes count them. Manifests are taken as they
    stand.

    Args:
        name: One of ``DATA_SETS``. "manifest" is for lists of one's own: a CSV or JSON (see ``read_manifest``) or a
            folder whose first-level sub-folders are the classes. docs/datasets.md has the layouts of the others.
        root: Folder of the data set; with "audioset" also the manifest to train on, with "manifest" the clips to train
            on; None with "demo".
        fold: With "esc50" the fold to test on, 1 to 5.
        labels: With "manifest" and "audioset", the file of the classes (see ``read_labels``). By default they are all
            labels that there are, and for AudioSet its own file.
        valid: With "manifest" and "audioset", the list of clips that choose the best epoch; none by default.
        test: The same for the clips to report on; AudioSet has its own by default.
        seed: Seed of the run; places the seconds of silence that Speech Commands v1 trains on.
        allow_outside: Whether manifests may name files outside their folders (see ``read_manifest``).

    Raises:
        FileNotFoundError: No such list or label file.
        ManifestError: Another name, an argument that the data set does not take, another layout, a malformed list, a
            list that names a file outside its folder, a fold that does not exist, a split without a clip at hand, or
            training clips all of one class (a ``LabelError``).
        OSError: A folder that cannot be read, or noise that cannot be.
    """
    found = survey(name, root, fold=fold, labels=labels, valid=valid, test=test, seed=seed, allow_outside=allow_outside)
    return DATA_SETS[name].build(found)

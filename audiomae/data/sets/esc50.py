"""ESC-50: 2,000 environmental sounds of 5 s, 50 classes, 5 folds (K. J. Piczak 2015; github.com/karolpiczak/ESC-50)."""

from collections.abc import Iterator
from pathlib import Path

from audiomae.data.labels import Labels
from audiomae.data.manifests import Manifest, ManifestError, audio_files, csv_records
from audiomae.data.sets.task import Request, Survey, Task, look_up

FOLDS = (1, 2, 3, 4, 5)
_META = Path("meta", "esc50.csv")
_COLUMNS = ("filename", "fold", "target", "category")


def survey(request: Request) -> Survey:
    """Look for the clips of each fold.

    Raises:
        ManifestError: No ESC-50 in the folder, or a malformed list.
        OSError: A folder that cannot be read.
    """
    meta, audio = request.root / _META, request.root / "audio"
    if not meta.is_file():
        raise ManifestError(f"{request.root}: no {_META}, expected the unpacked archive of ESC-50 (karolpiczak/ESC-50)")
    clips = list(_read(meta))
    categories = {target: category for _, _, target, category in clips}
    for name, _, target, category in clips:
        if categories[target] != category:
            raise ManifestError(f"{meta}: {name}: target {target} is {category!r}, elsewhere {categories[target]!r}")
    keys = tuple(categories[target] for target in sorted(categories))
    at_hand = {path: path for path in audio_files(audio)} if audio.is_dir() else {}
    folds = sorted({fold for _, fold, _, _ in clips})
    return Survey(
        request,
        Labels(keys, tuple(key.replace("_", " ") for key in keys), source=str(meta)),
        tuple(
            look_up(
                f"fold {fold}",
                ((name, (category,)) for name, of_fold, _, category in clips if of_fold == fold),
                at_hand,
                audio,
                published=400,
            )
            for fold in folds
        ),
        num_classes=50,
    )


def _read(meta: Path) -> Iterator[tuple[str, int, int, str]]:
    """Yield file name, fold, target and category of each clip."""
    try:
        for line, row in csv_records(meta, *((column,) for column in _COLUMNS)):
            if not (row["fold"].isdecimal() and row["target"].isdecimal()):
                raise ManifestError(
                    f"line {line}: fold is {row['fold']!r} and target {row['target']!r}, expected numbers"
                )
            yield row["filename"], int(row["fold"]), int(row["target"]), row["category"]
    except ValueError as error:  # also of a list that is not UTF-8, and a number of thousands of digits
        raise ManifestError(f"{meta}: {error}") from error


def build(found: Survey) -> Task:
    """Test on one fold and train on the others.

    Raises:
        ManifestError: A fold that does not exist, or of which no clip is at hand.
    """
    names = [part.name for part in found.parts]
    test = f"fold {found.request.fold}"
    if test not in names:
        there = ", ".join(name.removeprefix("fold ") for name in names)
        expected = "1 to 5" if there == "1, 2, 3, 4, 5" else f"one of those in {_META}, {there}"
        raise ManifestError(f"fold is {found.request.fold}, expected {expected}")
    train = Manifest.join([found.clips(name) for name in names if name != test])
    note = f"{test} is the test split and the others train; the protocol has no validation split"
    return found.task(train, test=found.clips(test), notes=[note])

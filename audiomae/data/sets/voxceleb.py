"""VoxCeleb1, identification: 153,516 utterances of 1,251 speakers (A. Nagrani et al. 2017)."""

from collections.abc import Iterator
from pathlib import Path

from audiomae.data.labels import Labels
from audiomae.data.manifests import ManifestError, audio_files
from audiomae.data.sets.task import Request, Survey, Task, look_up, read_lines

_SPLIT = "iden_split.txt"
_PARTS = {"train": ("1", 138_361), "valid": ("2", 6_904), "test": ("3", 8_251)}
_FOLDERS = ("wav", "dev/wav", "test/wav", "")  # where speakers' folders lie


def survey(request: Request) -> Survey:
    """Look for the utterances of each split.

    Raises:
        ManifestError: No VoxCeleb1 in the folder, or a malformed list.
        OSError: A folder that cannot be read.
    """
    split = request.root / _SPLIT
    if not split.is_file():
        raise ManifestError(
            f"{request.root}: no {_SPLIT}, expected it beside wav/, from VoxCeleb1's page (identification)"
        )
    listed = list(_read(split))
    speakers = tuple(sorted({_speaker(name) for _, name in listed}))
    at_hand: dict[str, str] = {}
    files = audio_files(request.root)
    for folder in _FOLDERS:
        prefix = f"{folder}/" if folder else ""
        for path in files:
            if path.startswith(prefix):
                at_hand.setdefault(path.removeprefix(prefix), path)
    return Survey(
        request,
        Labels(speakers, speakers, source=str(split)),
        tuple(
            look_up(
                part,
                ((name, (_speaker(name),)) for of_number, name in listed if of_number == number),
                at_hand,
                request.root,
                published,
            )
            for part, (number, published) in _PARTS.items()
        ),
        num_classes=1_251,
    )


def _speaker(name: str) -> str:
    return name.partition("/")[0]


def _read(split: Path) -> Iterator[tuple[str, str]]:
    """Yield the number of the split and the name of each utterance."""
    numbers = {number for number, _ in _PARTS.values()}
    for line, text in enumerate(read_lines(split), start=1):
        if not text.strip():
            continue
        number, _, name = text.strip().partition(" ")
        if number not in numbers or name.count("/") != 2:
            raise ManifestError(
                f"{split}: line {line}: expected '1 id10001/VIDEO/00001.wav' or the like, found {text!r}"
            )
        yield number, name


def build(found: Survey) -> Task:
    """Take the three splits as they are.

    Raises:
        ManifestError: A split of which no clip is at hand.
    """
    return found.task(found.clips("train"), found.clips("valid"), found.clips("test"), [f"split as {_SPLIT} says"])

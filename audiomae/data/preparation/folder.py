"""The folder that clips are converted into: whose it is, one process at a time, and what earlier ones left."""

import json
import os
import reprlib
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TextIO

from audiomae.atomic import remove_leftovers, replacing
from audiomae.data.preparation.journal import Journal
from audiomae.locks import NoLocksError, try_lock

INSIDE = ".prepare"
"""Sub-folder of the journal, the lock, and the files that are being written."""
SETTINGS = "prepare.json"


class PreparedFolder:
    """An output folder, locked and free of half-written files within a ``with`` statement.

    Args:
        path: The folder; made if missing.
        settings: What all runs in it must agree on, in plain values.

    Attributes:
        journal: What earlier runs wrote.
        temporary: Sub-folder of the files that are being written.
        notes: Lines that tell what was found on entering.

    Raises:
        ValueError: On entering, where the folder holds other things, or was made with other settings.
        OSError: On entering, where it cannot be written, or another process writes to it.
    """

    journal: Journal

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self._settings = path, settings
        self.temporary = path / INSIDE / "writing"
        self.notes: list[str] = []
        self._lock: TextIO | None = None

    def __enter__(self) -> Self:
        _refuse_others(self.path)
        (self.path / INSIDE).mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._agree()
            self._clean()
            self.temporary.mkdir()
            self.journal = Journal(self.path / INSIDE)
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._clean()
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self) -> TextIO:
        """Lock the folder for this process alone."""
        with ExitStack() as on_error:
            file = on_error.enter_context((self.path / INSIDE / "lock").open("a", encoding="utf-8"))
            try:
                if not try_lock(file, self.path):
                    raise OSError(f"another process prepares clips in {self.path}: wait for it to end")
            except NoLocksError as error:
                self.notes = [str(error)]
            on_error.pop_all()
        return file

    def _agree(self) -> None:
        """Compare the settings with those of earlier runs, or write them down for later ones."""
        path = self.path / SETTINGS
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(self._settings, indent=2) + "\n", encoding="utf-8")
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: no JSON, expected the settings of an earlier run") from error
        if not isinstance(earlier, dict):
            raise ValueError(f"{path}: holds {reprlib.repr(earlier)}, expected the settings of an earlier run")
        for name, value in self._settings.items():
            if earlier.get(name) != value:
                hint = f" (where it is the same list in a new place, say so in {path})" if name == "manifest" else ""
                raise ValueError(
                    f"{self.path} was made with {name} {earlier.get(name)!r}, not {value!r}: take another folder{hint}"
                )

    def _clean(self) -> None:
        """Remove what is half written; nobody else may be writing."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        remove_leftovers(self.path)


def _refuse_others(path: Path) -> None:
    """Raise ValueError for a folder with things in it that are not ours."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file, expected a folder")
    if (path / SETTINGS).exists():
        return
    # A run that was killed at once leaves no settings, but these.
    others = sorted(name for name in os.listdir(path) if name != INSIDE and not name.startswith(f"{SETTINGS}."))
    if others:
        raise ValueError(
            f"{path} holds other things ({reprlib.repr(others[0])[1:-1]}), expected a new or empty folder, or one that "
            f"this command made"
        )

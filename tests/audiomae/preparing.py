"""Folders of sound for ``audiomae.data.prepare``, running it, and what it left."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from audiomae.data.prepare import main


def run_prepare(capsys, *arguments: object, workers: int = 0) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as info:
        main([*map(str, arguments), "--workers", str(workers)])
    assert isinstance(info.value.code, int)
    return info.value.code, *capsys.readouterr()


def noise(seed: int, frames: int, channels: int = 1, peak: float = 0.9) -> np.ndarray:
    sound = np.cumsum(np.random.default_rng(seed).standard_normal((frames, channels)), axis=0)
    return peak * sound / np.abs(sound).max()


def state(out: Path) -> dict[str, tuple[int, int, int]]:
    """Identity and time of all clips that were written."""
    found = {str(path.relative_to(out)): path.stat() for path in out.rglob("*.flac")}
    return {name: (entry.st_ino, entry.st_mtime_ns, entry.st_size) for name, entry in found.items()}


def make_sounds(root: Path) -> Path:
    """Make a folder of six clips."""
    (root / "sub").mkdir(parents=True)
    for number in range(6):
        sf.write(root / ("sub" if number % 2 else ".") / f"{number}.wav", noise(number, 4_000 + number), 16_000)
    return root

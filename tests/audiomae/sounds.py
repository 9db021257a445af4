"""Sound files for the tests of reading them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from audiomae.data import ClipDataset, Manifest
from audiomae.seeding import clip_generator


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, channels)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = 16_000, **kwargs: Any) -> str:
    sf.write(path, samples, rate, **kwargs)
    return str(path)


def needs(audio_format: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(audio_format not in sf.available_formats(), reason=f"libsndfile without {audio_format}")


def dataset_of(*paths: str, **kwargs: Any) -> ClipDataset:
    return ClipDataset(Manifest((path, ()) for path in paths), **kwargs)


def crop_start(seed: int, epoch: int, clip: int, length: int) -> int:
    return int(clip_generator(seed, epoch, clip, "crop").integers(length))

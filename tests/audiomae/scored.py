"""Random scores and targets, and their evaluation."""

import numpy as np

from audiomae.metrics import Evaluation, evaluate_scores


def random_scores(clips: int, classes: int, seed: int, decimals: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Multi-label scores with many ties, better than chance, and targets that may leave out classes."""
    random = np.random.default_rng(seed)
    targets = random.random((clips, classes)) < random.uniform(0.02, 0.6, classes)
    scores = random.normal(size=(clips, classes)) + targets * random.uniform(0, 3, classes)
    return np.round(scores, decimals).astype(np.float32), targets


def random_single(clips: int, classes: int, seed: int, gain: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Single-label scores without ties."""
    random = np.random.default_rng(seed)
    targets = np.eye(classes, dtype=bool)[random.integers(0, classes, clips)]
    return random.normal(size=(clips, classes)) + gain * targets, targets


def names(classes: int) -> list[str]:
    return [f"class {index}" for index in range(classes)]


def evaluate(scores: np.ndarray, targets: np.ndarray, *, multi_label: bool) -> Evaluation:
    return evaluate_scores(scores, targets, names(scores.shape[1]), multi_label=multi_label)

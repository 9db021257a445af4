"""Metrics of classification, from the scores of all clips: scikit-learn's numbers, in a fraction of its time.

N clips, C classes. A class that is in no clip has no average precision, recall or ROC curve, and one that is in every
clip has no ROC curve: their values are NaN, the means are over the other classes, and the summary counts them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

MAX_LISTED = 5


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What :func:`evaluate_scores` found; the fields of the other kind of task are None.

    Attributes:
        names: The C classes.
        clips: N.
        positives: ``(C,)`` int64, the clips of each class.
        average_precision: ``(C,)`` float64, of each class against the rest; NaN for a class in no clip.
        auc: ``(C,)`` float64, the area under each ROC curve; NaN for a class in no or every clip. Multi-label only.
        confusion: ``(C, C)`` int64, clips by true and predicted class, as ``[true, predicted]``. Single-label only.
        top5: Share of the clips whose class is among the 5 with the highest scores. Single-label only.
    """

    names: tuple[str, ...]
    clips: int
    positives: np.ndarray
    average_precision: np.ndarray
    auc: np.ndarray | None = None
    confusion: np.ndarray | None = None
    top5: float | None = None

    @property
    def multi_label(self) -> bool:
        """Whether a clip may have any number of classes."""
        return self.confusion is None

    @property
    def recall(self) -> np.ndarray:
        """``(C,)``: share of a class's clips that are predicted as it; NaN for a class in no clip.

        Raises:
            ValueError: The task is multi-label.
        """
        return _divide(self._confusion().diagonal(), self.positives)

    @property
    def precision(self) -> np.ndarray:
        """``(C,)``: share of a class's predictions that are right; NaN for a class that is never predicted.

        Raises:
            ValueError: The task is multi-label.
        """
        return _divide(self._confusion().diagonal(), self._confusion().sum(axis=0))

    @property
    def classes_in_no_clip(self) -> tuple[str, ...]:
        """Names of the classes that no mean counts."""
        return self._named(self.positives == 0)

    @property
    def classes_in_every_clip(self) -> tuple[str, ...]:
        """Names of the classes that mAP counts and the mean AUC does not."""
        return self._named(self.positives == self.clips)

    def summary(self) -> dict[str, float]:
        """The metrics of the whole set, and its counts, by name.

        mAP and AUC are means over classes. d-prime is that of the mean AUC, as the field reports it, and infinite for
        an AUC of 1. AUC and d-prime are NaN if no class has a ROC curve.
        """
        mean_ap = _mean(self.average_precision)
        counts = {"clips": self.clips, "classes": len(self.names), "classes in no clip": len(self.classes_in_no_clip)}
        if self.auc is not None:
            mean_auc = _mean(self.auc)
            counts["classes in every clip"] = len(self.classes_in_every_clip)
            return {"mAP": mean_ap, "AUC": mean_auc, "d-prime": d_prime(mean_auc), **counts}
        assert self.top5 is not None
        return {"top-1": float(self._confusion().trace() / self.clips), "top-5": self.top5, "mAP": mean_ap, **counts}

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a class: "index", "class", "clips", and its metrics by name, NaN where it has none."""
        columns: dict[str, np.ndarray] = {"AP": self.average_precision}
        if self.auc is not None:
            columns |= {"AUC": self.auc, "d-prime": np.array([d_prime(auc) for auc in self.auc.tolist()])}
        else:
            columns = {"recall": self.recall, "precision": self.precision, **columns}
        metrics = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            {"index": index, "class": name, "clips": clips, **dict(zip(columns, values, strict=True))}
            for index, (name, clips, values) in enumerate(
                zip(self.names, self.positives.tolist(), metrics, strict=True)
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it: a number that is not finite becomes None, as JSON has none of these."""
        content: dict[str, Any] = {
            "multi_label": self.multi_label,
            "summary": _finite(self.summary()),
            "classes_in_no_clip": list(self.classes_in_no_clip),
            "classes_in_every_clip": list(self.classes_in_every_clip),
            "classes": [_finite(row) for row in self.rows()],
        }
        if self.confusion is not None:
            content["confusion"] = self.confusion.tolist()
        return content

    def _named(self, chosen: np.ndarray) -> tuple[str, ...]:
        return tuple(self.names[index] for index in np.flatnonzero(chosen))

    def _confusion(self) -> np.ndarray:
        if self.confusion is None:
            raise ValueError("a multi-label evaluation has no confusion matrix, and so no recall and precision")
        return self.confusion


def evaluate_scores(scores: np.ndarray, targets: np.ndarray, names: Sequence[str], *, multi_label: bool) -> Evaluation:
    """Compute the metrics of a classifier from its scores of all clips.

    Only the order of scores matters: over classes for accuracy, over clips for average precision and AUC. So logits and
    sigmoids give the same, but a softmax reorders clips. Among equal scores of a clip the first class is the highest,
    as for ``argmax``; equal scores of a class share one threshold, as in scikit-learn.

    Args:
        scores: ``(N, C)`` floating point.
        targets: ``(N, C)`` bool. Any number of classes a clip if ``multi_label``, exactly one otherwise.
        names: The C classes.
        multi_label: Average precision and ROC curves of each class, instead of accuracy and a confusion matrix.

    Raises:
        TypeError: Scores that are not floating point, or targets that are not bool.
        ValueError: Shapes that do not go together, no clips, scores that are not finite, no class in any clip, or, in a
            single-label task, a single class or a clip that has not exactly one.
    """
    _check(scores, targets, names, multi_label)
    clips, classes = scores.shape
    curves = [_rank(scores[:, index], targets[:, index]) for index in range(classes)]
    average_precision, auc = np.array(curves).T
    common = {"names": tuple(names), "clips": clips, "positives": targets.sum(axis=0)}
    if multi_label:
        return Evaluation(**common, average_precision=average_precision, auc=auc)
    true = targets.argmax(axis=1)
    pairs = np.bincount(classes * true + scores.argmax(axis=1), minlength=classes**2)
    own = np.take_along_axis(scores, true[:, None], axis=1)
    ahead = (scores > own) | ((scores == own) & (np.arange(classes) < true[:, None]))
    return Evaluation(
        **common,
        average_precision=average_precision,
        confusion=pairs.reshape(classes, classes),
        top5=float((ahead.sum(axis=1) < 5).mean()),
    )


def headline(evaluation: Evaluation) -> tuple[str, float]:
    """The metric that the paper reports of such a task, by name: mAP if it is multi-label, otherwise top-1 accuracy."""
    name = "mAP" if evaluation.multi_label else "top-1"
    return name, evaluation.summary()[name]


def d_prime(auc: float) -> float:
    """Distance of two normal distributions of variance 1 whose ROC curve has this area: sqrt(2) times its quantile.

    Infinite for an area of 1, and minus infinity for 0.

    Raises:
        ValueError: An area outside [0, 1]; NaN gives NaN.
    """
    if auc in (0, 1):
        return math.inf if auc else -math.inf
    if not (0 < auc < 1 or math.isnan(auc)):
        raise ValueError(f"auc is {auc}, expected an area in [0, 1]")
    return math.sqrt(2) * NormalDist().inv_cdf(auc)


def list_few(items: Sequence[object], separator: str = ", ") -> str:
    """The first few items, and how many there are beyond."""
    beyond = len(items) - MAX_LISTED
    return separator.join(str(item) for item in items[:MAX_LISTED]) + (f" and {beyond} more" if beyond > 0 else "")


def _check(scores: np.ndarray, targets: np.ndarray, names: Sequence[str], multi_label: bool) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores has shape {scores.shape}, expected (clips, classes)")
    if targets.shape != scores.shape:
        raise ValueError(f"targets has shape {targets.shape}, expected that of scores, {scores.shape}")
    if len(names) != scores.shape[1]:
        raise ValueError(f"names has {len(names)} entries, expected one for each of {scores.shape[1]} classes")
    if not scores.size:
        raise ValueError(f"scores has shape {scores.shape}, expected at least one clip and one class")
    if not np.issubdtype(scores.dtype, np.floating):
        raise TypeError(f"scores is of {scores.dtype}, expected floating point")
    if targets.dtype != bool:
        raise TypeError(f"targets is of {targets.dtype}, expected bool")
    finite = np.isfinite(scores).all(axis=1)
    if not finite.all():
        raise ValueError(f"scores holds NaN or infinity in {_rows(~finite)}")
    if multi_label and not targets.any():
        raise ValueError(f"no clip has any of the {len(names)} classes, so there is nothing to evaluate")
    if not multi_label and len(names) == 1:
        raise ValueError(f"the only class is {names[0]!r}, and a single-label task needs at least two")
    single = targets.sum(axis=1) == 1
    if not multi_label and not single.all():
        raise ValueError(f"targets has no class or several in {_rows(~single)}, expected one class a clip")


def _rows(chosen: np.ndarray) -> str:
    return f"{chosen.sum()} of {len(chosen)} clips, at rows {list_few(np.flatnonzero(chosen).tolist())}"


def _rank(scores: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Average precision and area under the ROC curve of one class, NaN where there is none.

    The first is the mean, over positive clips, of the precision among the clips that score as high or higher. The
    second is the chance that a positive clip scores higher than a negative one, equal scores counting half. Two sorts
    give both; scikit-learn's curves of 527 classes and 20,000 clips take 20 times as long.
    """
    positives = np.sort(scores[targets])
    if not positives.size:
        return math.nan, math.nan
    everything = np.sort(scores)
    below, up_to = (np.searchsorted(everything, positives, side) for side in ("left", "right"))
    positives_below, positives_up_to = (np.searchsorted(positives, positives, side) for side in ("left", "right"))
    average_precision = ((positives.size - positives_below) / (everything.size - below)).mean()
    negatives = everything.size - positives.size
    if not negatives:
        return float(average_precision), math.nan
    lower = (below - positives_below + up_to - positives_up_to).mean() / 2
    return float(average_precision), float(lower / negatives)


def _divide(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    return np.divide(parts, wholes, out=np.full(len(wholes), np.nan), where=wholes > 0)


def _mean(values: np.ndarray) -> float:
    """Mean of what is defined."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }

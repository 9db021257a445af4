"""Metrics against scikit-learn."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics

from audiomae.metrics import d_prime, evaluate_scores, headline

from .scored import evaluate, names, random_scores, random_single

pytestmark = pytest.mark.filterwarnings("error")


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("clips", "classes"), [(1, 3), (2, 1), (7, 5), (61, 1), (211, 13)])
def test_multi_label_is_scikit_learn(clips, classes, dtype):
    scores, targets = random_scores(clips, classes, seed=clips)
    scores = scores.astype(dtype)
    targets[0, 0] = True
    evaluation = evaluate(scores, targets, multi_label=True)
    in_some = targets.any(axis=0)
    has_curve = in_some & ~targets.all(axis=0)
    precisions = [metrics.average_precision_score(targets[:, i], scores[:, i]) for i in np.flatnonzero(in_some)]
    areas = [metrics.roc_auc_score(targets[:, i], scores[:, i]) for i in np.flatnonzero(has_curve)]
    close(evaluation.average_precision[in_some], precisions)
    assert np.isnan(evaluation.average_precision[~in_some]).all()
    close(evaluation.auc[has_curve], areas)
    assert np.isnan(evaluation.auc[~has_curve]).all()
    mean_auc = np.mean(areas) if areas else math.nan
    summary = evaluation.summary()
    assert list(summary)[:3] == ["mAP", "AUC", "d-prime"]
    close(summary.pop("mAP"), np.mean(precisions))
    close(summary.pop("AUC"), mean_auc)
    close(summary.pop("d-prime"), math.sqrt(2) * norm.ppf(mean_auc))
    assert summary == {
        "clips": clips,
        "classes": classes,
        "classes in no clip": (~in_some).sum(),
        "classes in every clip": targets.all(axis=0).sum(),
    }
    close([row["d-prime"] for row in evaluation.rows()], math.sqrt(2) * norm.ppf(evaluation.auc))


@pytest.mark.parametrize(("clips", "classes"), [(1, 2), (40, 2), (37, 4), (90, 7), (300, 61)])
def test_single_label_is_scikit_learn(clips, classes):
    scores, targets = random_single(clips, classes, seed=classes)
    evaluation = evaluate(scores, targets, multi_label=False)
    true, predicted, every = targets.argmax(axis=1), scores.argmax(axis=1), np.arange(classes)
    present = targets.any(axis=0)
    summary = evaluation.summary()
    assert list(summary)[:3] == ["top-1", "top-5", "mAP"]
    close(summary.pop("top-1"), metrics.accuracy_score(true, predicted))
    top5 = metrics.top_k_accuracy_score(true, scores, k=5, labels=every) if classes > 5 else 1.0
    close(summary.pop("top-5"), top5)
    each = [metrics.average_precision_score(targets[:, i], scores[:, i]) for i in np.flatnonzero(present)]
    close(summary.pop("mAP"), np.mean(each))
    assert summary == {"clips": clips, "classes": classes, "classes in no clip": (~present).sum()}
    np.testing.assert_array_equal(evaluation.confusion, metrics.confusion_matrix(true, predicted, labels=every))
    precision, recall, _, count = metrics.precision_recall_fscore_support(
        true, predicted, labels=every, zero_division=math.nan
    )
    close(evaluation.precision, precision)
    close(evaluation.recall, recall)
    np.testing.assert_array_equal(evaluation.positives, count)


def test_constant_scores_are_chance():
    targets = np.zeros((40, 6), dtype=bool)
    targets[np.arange(40), np.arange(40) % 6] = True  # 7, 7, 7, 7, 6, 6 clips
    evaluation = evaluate(np.zeros((40, 6)), targets, multi_label=True)
    close(evaluation.average_precision, targets.mean(axis=0))
    close(evaluation.auc, 0.5)
    close(evaluation.summary()["d-prime"], 0)
    single = evaluate(np.zeros((40, 6)), targets, multi_label=False)
    # The first class is the prediction, and the first five are the five highest.
    assert single.summary()["top-1"] == 7 / 40
    assert single.summary()["top-5"] == 34 / 40
    assert single.confusion[:, 0].tolist() == [7, 7, 7, 7, 6, 6]
    assert np.isnan(single.precision[1:]).all()


def test_perfect_and_reversed_scores():
    _, targets = random_scores(50, 4, seed=3)
    perfect = evaluate(targets.astype(float), targets, multi_label=True)
    assert (perfect.average_precision == 1).all()
    assert perfect.summary()["d-prime"] == math.inf
    assert evaluate(-targets.astype(float), targets, multi_label=True).summary()["d-prime"] == -math.inf


def test_scores_count_by_their_order_alone():
    scores, targets = random_scores(80, 5, seed=8)
    logits = evaluate(scores.astype(np.float64), targets, multi_label=True).to_dict()
    assert evaluate(1 / (1 + np.exp(-scores.astype(np.float64))), targets, multi_label=True).to_dict() == logits


def test_classes_without_a_value_are_told_and_left_out():
    scores, targets = random_scores(30, 5, seed=1)
    targets[:, [1, 4]] = False
    targets[:, 2] = True
    evaluation = evaluate(scores, targets, multi_label=True)
    assert evaluation.classes_in_no_clip == ("class 1", "class 4")
    assert evaluation.classes_in_every_clip == ("class 2",)
    summary = evaluation.summary()
    assert summary["classes in no clip"] == 2
    assert summary["classes in every clip"] == 1
    close(summary["mAP"], evaluation.average_precision[[0, 2, 3]].mean())
    close(summary["AUC"], evaluation.auc[[0, 3]].mean())
    rows = evaluation.rows()
    assert [list(row) for row in rows] == [["index", "class", "clips", "AP", "AUC", "d-prime"]] * 5
    assert math.isnan(rows[1]["AP"])
    assert rows[2]["AP"] == 1
    assert math.isnan(rows[2]["AUC"])
    content = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert content["classes_in_no_clip"] == ["class 1", "class 4"]
    assert content["classes_in_every_clip"] == ["class 2"]
    assert content["classes"][1] == {
        "index": 1,
        "class": "class 1",
        "clips": 0,
        "AP": None,
        "AUC": None,
        "d-prime": None,
    }
    assert content["classes"][0]["AP"] == evaluation.average_precision[0]
    assert "confusion" not in content


def test_no_class_has_a_curve():
    evaluation = evaluate(np.ones((3, 2)), np.ones((3, 2), dtype=bool), multi_label=True)
    summary = evaluation.summary()
    assert summary["mAP"] == 1
    assert math.isnan(summary["AUC"])
    assert math.isnan(summary["d-prime"])
    assert evaluation.to_dict()["summary"]["AUC"] is None


def test_single_label_content():
    scores, targets = random_single(20, 3, seed=2)
    targets[:] = [True, False, False]
    evaluation = evaluate(scores, targets, multi_label=False)
    content = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert content["multi_label"] is False
    assert content["confusion"] == evaluation.confusion.tolist()
    assert list(content["classes"][0]) == ["index", "class", "clips", "recall", "precision", "AP"]
    assert content["classes"][0]["recall"] == evaluation.summary()["top-1"]
    assert content["classes"][2]["recall"] is None
    assert content["classes"][2]["precision"] == 0


def test_the_headline():
    multi = evaluate(*random_scores(30, 5, seed=1), multi_label=True)
    assert headline(multi) == ("mAP", multi.summary()["mAP"])
    single = evaluate(*random_single(30, 5, seed=1), multi_label=False)
    assert headline(single) == ("top-1", single.summary()["top-1"])
    with pytest.raises(ValueError, match=r"^a multi-label evaluation has no confusion matrix, and so no recall"):
        _ = multi.recall


def test_d_prime():
    areas = [1e-9, 0.1, 0.5, 0.973, 1 - 1e-9]
    np.testing.assert_allclose([d_prime(area) for area in areas], math.sqrt(2) * norm.ppf(areas), rtol=1e-12)
    assert d_prime(1.0) == math.inf
    assert d_prime(0.0) == -math.inf
    assert math.isnan(d_prime(math.nan))
    with pytest.raises(ValueError, match=r"^auc is 1.2, expected an area in \[0, 1\]$"):
        d_prime(1.2)


def with_values(shape: tuple[int, int], rows: list[int], value: float) -> np.ndarray:
    array = np.zeros(shape)
    array[rows, -1] = value
    return array


ONE_HOT = np.eye(3, dtype=bool)[[0, 1, 2, 0, 1, 2, 0, 1]]
SCORES = np.zeros((8, 3))
BAD_INPUT: dict[str, tuple[np.ndarray, np.ndarray, bool]] = {
    "scores has shape (8,), expected (clips, classes)": (SCORES[:, 0], ONE_HOT, True),
    "targets has shape (8, 3), expected that of scores, (8, 2)": (SCORES[:, :2], ONE_HOT, True),
    "targets has shape (8, 3), expected that of scores, (7, 3)": (SCORES[:7], ONE_HOT, True),
    "names has 3 entries, expected one for each of 2 classes": (SCORES[:, :2], ONE_HOT[:, :2], True),
    "scores has shape (0, 3), expected at least one clip and one class": (SCORES[:0], ONE_HOT[:0], True),
    "scores is of int64, expected floating point": (SCORES.astype(int), ONE_HOT, True),
    "targets is of float64, expected bool": (SCORES, ONE_HOT * 1.0, True),
    "scores holds NaN or infinity in 2 of 8 clips, at rows 2, 5": (
        with_values((8, 3), [2, 5], math.nan),
        ONE_HOT,
        True,
    ),
    "scores holds NaN or infinity in 7 of 8 clips, at rows 0, 2, 3, 4, 5 and 2 more": (
        with_values((8, 3), [0, 2, 3, 4, 5, 6, 7], -math.inf),
        ONE_HOT,
        False,
    ),
    "no clip has any of the 3 classes, so there is nothing to evaluate": (SCORES, ONE_HOT & False, True),
    "targets has no class or several in 1 of 8 clips, at rows 3, expected one class a clip": (
        SCORES,
        ONE_HOT & (np.arange(8) != 3)[:, None],
        False,
    ),
    "targets has no class or several in 8 of 8 clips, at rows 0, 1, 2, 3, 4 and 3 more, expected one class a clip": (
        SCORES,
        ONE_HOT ^ np.array([True, False, False]),
        False,
    ),
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input(message):
    scores, targets, multi_label = BAD_INPUT[message]
    with pytest.raises(TypeError if " is of " in message else ValueError, match=f"^{re.escape(message)}$"):
        evaluate_scores(scores, targets, names(3), multi_label=multi_label)


def test_a_single_class_is_no_single_label_task():
    with pytest.raises(ValueError, match=r"^the only class is 'dog', and a single-label task needs at least two$"):
        evaluate_scores(np.zeros((2, 1)), np.ones((2, 1), dtype=bool), ["dog"], multi_label=False)

"""What the table, the files and the pictures of an evaluation show, and the mean over folds."""

import csv
import io
import json
import math
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from audiomae.metrics import Evaluation, evaluate_scores, evaluation_figure, fold_summary, print_table, write_report

from .scored import evaluate, names, random_scores, random_single

pytestmark = pytest.mark.filterwarnings("error")

AWKWARD_NAMES = ("[bold]Horn[/bold], car horn", "$x_1$ and $y^2", "Größe, ☃", "a" * 90)


def printed(evaluation: Evaluation, width: int = 80) -> list[str]:
    stream = io.StringIO()
    print_table(evaluation, Console(file=stream, width=width))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("classes", [2, 19, 20, 527])
def test_the_table_fits_a_terminal(classes, multi_label):
    random = random_scores if multi_label else random_single
    long_names = [f"{'a long name of a class, ' * 3}{index}" for index in range(classes)]
    scores, targets = random(400, classes, 5)
    evaluation = evaluate_scores(scores, targets, long_names, multi_label=multi_label)
    lines = printed(evaluation)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 32
    rows = [line for line in lines if re.match(r" a long", line)]
    present = classes - len(evaluation.classes_in_no_clip)
    assert len(rows) == (present if present <= 19 else 18)
    assert any(f"… {present - 18} more …" in line for line in lines) == (present > 19)


def test_the_table_shows_the_best_and_the_worst():
    targets = np.eye(30, dtype=bool).repeat(4, axis=0)
    scores = targets * 1.0
    scores[4 * 7 : 4 * 7 + 3] = np.eye(30)[11]  # three clips of class 7 are taken for 11
    scores[4 * 9] = np.eye(30)[12]
    lines = printed(evaluate(scores, targets, multi_label=False), width=100)
    assert lines[0].startswith(f"top-1 {116 / 120:.4f}   top-5 ")
    assert lines[1] == "120 clips, 30 classes"
    assert re.search(r"class 0 +4 +1\.000 +1\.000 +1\.000$", lines[5])
    assert re.search(r"class 9 +4 +0\.750 +1\.000 +\S+ +1 class 12$", lines[-3])
    assert re.search(r"class 7 +4 +0\.250 +1\.000 +\S+ +3 class 11$", lines[-2])


def test_the_table_tells_what_is_left_out():
    scores, targets = random_scores(30, 9, seed=1)
    targets[:, :7] = False
    targets[:, 7] = True
    lines = printed(evaluate(scores, targets, multi_label=True), width=150)
    assert lines[2] == (
        "7 classes are in no clip, so in no mean: class 0; class 1; class 2; class 3; class 4 and 2 more"
    )
    assert lines[3] == "1 class is in every clip, so not in the mean AUC: class 7"
    assert re.search(r"class 7 +30 +1\.000 +- +-$", "\n".join(lines), re.MULTILINE)


def test_names_are_printed_as_they_are():
    scores, targets = random_scores(50, 4, seed=1)
    text = "\n".join(printed(evaluate_scores(scores, targets, AWKWARD_NAMES, multi_label=True), width=150))
    assert all(name in text for name in AWKWARD_NAMES)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_report_holds_everything(tmp_path, multi_label):
    scores, targets = (random_scores if multi_label else random_single)(50, 4, seed=1)
    targets[targets[:, 2]] = [True, False, False, False]  # nothing of class 2 is left
    evaluation = evaluate_scores(scores, targets, AWKWARD_NAMES, multi_label=multi_label)
    folder = tmp_path / "a" / "b"
    write_report(evaluate_scores(scores[:9], targets[:9], AWKWARD_NAMES, multi_label=multi_label), folder)
    write_report(evaluation, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["classes.csv", "evaluation.json", "evaluation.png"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "evaluation.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == evaluation.to_dict()
    with (folder / "classes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(AWKWARD_NAMES)
    assert rows[2]["AP"] == ""
    for row, expected in zip(rows, evaluation.rows(), strict=True):
        assert row == {name: "" if value != value else str(value) for name, value in expected.items()}
    with Image.open(folder / "evaluation.png") as image:
        assert image.format == "PNG"
        assert image.width >= 600


def test_a_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_report(evaluate(*random_scores(20, 3, seed=1), multi_label=True), tmp_path / "file")


def drawn(evaluation: Evaluation) -> Figure:
    figure = evaluation_figure(evaluation)
    FigureCanvasAgg(figure).draw()
    return figure


def test_the_confusion_matrix_is_drawn_in_percent():
    targets = np.zeros((10, 3), dtype=bool)
    targets[:, 0], targets[6:, 0], targets[6:, 1] = True, False, True  # 6, 4 and 0 clips
    scores = np.zeros((10, 3))
    scores[np.arange(10), [0, 0, 0, 1, 1, 2, 1, 1, 1, 1]] = 1
    figure = drawn(evaluate(scores, targets, multi_label=False))
    axis = figure.axes[0]
    shown = axis.images[0].get_array()
    np.testing.assert_allclose(shown[:2].filled(), [[50, 100 / 3, 50 / 3], [0, 100, 0]])
    assert shown[2].mask.all()
    assert {text.get_position(): text.get_text() for text in axis.texts} == {
        (0, 0): "50",
        (1, 0): "33",
        (2, 0): "17",
        (1, 1): "100",
    }
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["class 0 (6)", "class 1 (4)", "class 2 (0)"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == names(3)
    assert figure.get_suptitle() == "top-1 0.7000   top-5 1.0000   mAP 0.7333   (10 clips)\n1 class is in no clip"


def test_rare_mistakes_are_not_drawn_as_zero():
    targets = np.eye(2, dtype=bool)[[0] * 300 + [1]]
    scores = targets * 1.0
    scores[0] = [0, 1]
    texts = [text.get_text() for text in drawn(evaluate(scores, targets, multi_label=False)).axes[0].texts]
    assert texts == ["100", "<1", "100"]


def test_many_classes_are_drawn_by_recall():
    targets = np.eye(51, dtype=bool).repeat(3, axis=0)
    scores = targets * 1.0
    perfect = drawn(evaluate(scores, targets, multi_label=False))
    assert perfect.axes[1].get_title() == "no mistakes"
    scores[:3] = np.eye(51)[[0, 7, 7]]
    scores[30] = np.eye(51)[3]
    evaluation = evaluate(scores, targets, multi_label=False)
    left, right = drawn(evaluation).axes
    assert left.get_legend().get_texts()[0].get_text() == f"mean recall {evaluation.recall.mean():.3f}"
    np.testing.assert_allclose(left.patches[0].get_data().values, [1] * 49 + [2 / 3, 1 / 3])
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["class 0 → class 7", "class 10 → class 3"]
    assert [bar.get_width() for bar in right.patches] == [2, 1]


@pytest.mark.parametrize("classes", [1, 24, 60])
def test_average_precision_is_drawn_over_the_clips(classes):
    scores, targets = random_scores(100, classes, seed=4)
    targets[:, classes // 2 :] |= targets[:, :1]
    evaluation = evaluate(scores, targets, multi_label=True)
    left, right = drawn(evaluation).axes
    points = [(row["clips"], row["AP"]) for row in evaluation.rows() if row["clips"]]
    assert len(points) >= min(classes, 50)
    assert sorted(map(tuple, left.collections[0].get_offsets().tolist())) == sorted(points)
    low, high = left.get_xlim()
    assert low < min(points)[0] <= max(points)[0] < high
    assert "" not in [tick.get_text() for tick in left.get_xticklabels()]
    ranked = sorted((precision for _, precision in points), reverse=True)
    assert [bar.get_width() for bar in right.patches] == (ranked if classes <= 24 else ranked[:12] + ranked[-12:])


@pytest.mark.parametrize("multi_label", [False, True])
def test_awkward_names_are_drawn_as_they_are(multi_label):
    scores, targets = (random_scores if multi_label else random_single)(50, 4, seed=1)
    figure = drawn(evaluate_scores(scores, targets, AWKWARD_NAMES, multi_label=multi_label))
    labels = [tick.get_text() for axis in figure.axes for tick in axis.get_yticklabels()]
    assert any(label.startswith("$x_1$ and $y^2 (") for label in labels)
    assert any(label.startswith("aaaaaaaaaaaa…aaaaaaaaaaaaa (") for label in labels)


def test_folds():
    folds = [evaluate(*random_single(30, 5, seed=seed), multi_label=False) for seed in range(4)]
    summary = fold_summary(folds)
    assert summary.keys() == folds[0].summary().keys()
    for name, found in summary.items():
        values = [fold.summary()[name] for fold in folds]
        np.testing.assert_allclose([found["mean"], found["std"]], [np.mean(values), np.std(values, ddof=1)])
    assert fold_summary([json.loads(json.dumps(fold.summary())) for fold in folds]) == summary


def test_folds_without_a_value():
    one = fold_summary([{"AUC": 0.5}])["AUC"]
    assert one["mean"] == 0.5
    assert math.isnan(one["std"])
    for missing in (None, math.nan):
        found = fold_summary([{"AUC": 0.5}, {"AUC": missing}])["AUC"]
        assert math.isnan(found["mean"])
        assert math.isnan(found["std"])
    found = fold_summary([{"d-prime": 2.0}, {"d-prime": math.inf}])["d-prime"]
    assert found["mean"] == math.inf
    assert math.isnan(found["std"])


def test_folds_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"^there are no folds to summarise$"):
        fold_summary([])
    with pytest.raises(ValueError, match=r"^fold 1 has \['top-1'\], expected those of fold 0, \['mAP'\]$"):
        fold_summary([{"mAP": 0.5}, {"top-1": 0.5}])

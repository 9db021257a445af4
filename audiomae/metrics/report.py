"""An evaluation as a table in the terminal, as files, and as a picture; the mean over folds of a cross-validation."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from audiomae.atomic import replacing
from audiomae.metrics.scores import Evaluation, list_few

MAX_TABLE_ROWS = 19
MAX_CONFUSION_CLASSES = 50
MAX_BARS = 24
MAX_LABEL = 26


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Print the summary and the classes, best first: all of a few, the best and the worst of many."""
    console.print(Text(_summary_line(evaluation)))
    console.print(Text(f"{evaluation.clips:,} clips, {_counted(len(evaluation.names), 'class', 'classes')}"))
    for classes, where, consequence in (
        (evaluation.classes_in_no_clip, "in no clip", "in no mean"),
        (evaluation.classes_in_every_clip if evaluation.multi_label else (), "in every clip", "not in the mean AUC"),
    ):
        if classes:
            count = _counted(len(classes), "class is", "classes are")
            console.print(Text(f"{count} {where}, so {consequence}: {list_few(classes, '; ')}"))

    order = _best_first(evaluation)
    rows = evaluation.rows()
    metrics = list(rows[0])[3:]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("class")
    for name in ("clips", *metrics):
        table.add_column(name, justify="right", no_wrap=True)
    if not evaluation.multi_label:
        table.add_column("most often taken for")
    half = MAX_TABLE_ROWS // 2
    shown = order if len(order) <= MAX_TABLE_ROWS else [*order[:half], *order[-half:]]
    for place, index in enumerate(shown):
        row = rows[index]
        numbers = [f"{row['clips']:,}", *("-" if math.isnan(row[name]) else f"{row[name]:.3f}" for name in metrics)]
        mistake = [] if evaluation.multi_label else [_cell(_mistake(evaluation, index))]
        table.add_row(_cell(row["class"]), *numbers, *mistake)
        if len(shown) < len(order) and place == half - 1:
            table.add_row(_cell(f"… {len(order) - len(shown)} more …", style="dim"))
    console.print(table)


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write ``evaluation.json``, ``classes.csv`` and ``evaluation.png``, each of which a crash leaves whole.

    The JSON is :meth:`Evaluation.to_dict`, the CSV :meth:`Evaluation.rows` with an empty field for NaN.

    Args:
        evaluation: What to report.
        folder: Where to write; made if missing.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "evaluation.json") as temporary:
        # A line each: indented, the matrix of a thousand classes would take a million lines.
        fields = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in evaluation.to_dict().items())
        temporary.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")
    rows = evaluation.rows()
    with (
        replacing(folder / "classes.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if isinstance(x, float) and math.isnan(x) else x for key, x in row.items()})
    with replacing(folder / "evaluation.png") as temporary:
        FigureCanvasAgg(evaluation_figure(evaluation)).print_figure(temporary, format="png")


def fold_summary(folds: Sequence[Evaluation | Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    """Compute the mean and the sample standard deviation of each number of the summary over the folds.

    Args:
        folds: Evaluations, or their summaries, also as JSON has them, with None for what is not finite.

    Returns:
        ``{"mean": ..., "std": ...}`` by the number's name. Both are NaN where a fold has NaN or None, and the deviation
        is NaN for a single fold.

    Raises:
        ValueError: No folds, or folds with different metrics.
    """
    summaries = [fold.summary() if isinstance(fold, Evaluation) else fold for fold in folds]
    if not summaries:
        raise ValueError("there are no folds to summarise")
    for number, summary in enumerate(summaries):
        if summary.keys() != summaries[0].keys():
            raise ValueError(f"fold {number} has {list(summary)}, expected those of fold 0, {list(summaries[0])}")
    result = {}
    for name in summaries[0]:
        values = np.array([summary[name] for summary in summaries], dtype=np.float64)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        result[name] = {"mean": float(values.mean()), "std": std}
    return result


def evaluation_figure(evaluation: Evaluation) -> Figure:
    """Draw what the numbers do not show.

    - Multi-label: average precision of each class over its clips, next to what chance gives, and the best and the worst
      classes.
    - Single-label, up to 50 classes: the confusion matrix, each row in percent of its clips.
    - Single-label, more: the recall of all classes, sorted, and the most frequent mistakes.
    """
    if evaluation.multi_label:
        figure = _average_precision_figure(evaluation)
    elif len(evaluation.names) <= MAX_CONFUSION_CLASSES:
        figure = _confusion_figure(evaluation)
    else:
        figure = _recall_figure(evaluation)
    missing = len(evaluation.classes_in_no_clip)
    note = f"\n{_counted(missing, 'class is', 'classes are')} in no clip" if missing else ""
    figure.suptitle(f"{_summary_line(evaluation)}   ({evaluation.clips:,} clips){note}", fontsize="medium")
    return figure


def _average_precision_figure(evaluation: Evaluation) -> Figure:
    order = _best_first(evaluation)
    few = len(order) <= MAX_BARS
    shown = order if few else [*order[: MAX_BARS // 2], *order[-MAX_BARS // 2 :]]
    figure = Figure(figsize=(12, max(4.0, 1.6 + 0.21 * len(shown))), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    clips, values = evaluation.positives[order], evaluation.average_precision[order]
    limits = 10 ** np.floor(np.log10(clips.min())) / 1.3, 10 ** np.ceil(np.log10(clips.max() + 1)) * 1.3
    chance = np.geomspace(limits[0], min(evaluation.clips, limits[1]))
    left.plot(chance, chance / evaluation.clips, color="0.5", linestyle=":", label="chance")
    mean = evaluation.summary()["mAP"]
    left.axhline(mean, color="C1", linestyle="--", linewidth=1, label=f"mAP {mean:.3f}")
    left.scatter(clips, values, s=14 if len(order) > 100 else 28, alpha=0.6, linewidths=0)
    left.set(xscale="log", xlim=limits, ylim=(-0.02, 1.02), xlabel="clips of the class", ylabel="average precision")
    left.xaxis.set_major_formatter("{x:,g}")
    left.xaxis.set_minor_formatter("")
    left.grid(alpha=0.3)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    title = "classes, best first" if few else f"the {MAX_BARS // 2} best and {MAX_BARS // 2} worst of {len(order)}"
    labels = [f"{_shorten(evaluation.names[index])} ({evaluation.positives[index]:,})" for index in shown]
    _draw_bars(
        right, labels, evaluation.average_precision[shown], title=title, label="average precision", number="{:.3f}"
    )
    right.set_xlim(0, 1.12)
    if not few:
        right.axhline(MAX_BARS // 2 - 0.5, color="0.5", linewidth=1)
    return figure


def _confusion_figure(evaluation: Evaluation) -> Figure:
    assert evaluation.confusion is not None
    classes = len(evaluation.names)
    clips = evaluation.positives[:, None]
    percent = np.full(evaluation.confusion.shape, np.nan)
    np.divide(100 * evaluation.confusion, clips, out=percent, where=clips > 0)
    side = max(2.5, (0.5 if classes <= 20 else 0.24) * classes)
    figure = Figure(figsize=(side + 4, side + 2.5), dpi=120, layout="compressed")
    axis = figure.subplots()
    image = axis.imshow(percent, cmap=matplotlib.colormaps["Blues"].with_extremes(bad="0.8"), vmin=0, vmax=100)
    size = 9 if classes <= 20 else 6
    for row, column in np.argwhere(percent > 0):
        value = percent[row, column]
        text = f"{value:.0f}" if value >= 0.5 else "<1"
        axis.text(column, row, text, ha="center", va="center", size=size, color="white" if value > 55 else "black")
    names = [_shorten(name) for name in evaluation.names]
    rows = [f"{name} ({count:,})" for name, count in zip(names, evaluation.positives, strict=True)]
    font: dict[str, Any] = {"fontsize": "medium" if classes <= 20 else "x-small", "parse_math": False}
    axis.set_yticks(range(classes), rows, **font)
    axis.set_xticks(range(classes), names, rotation=90, **font)
    axis.set(xlabel="predicted class", ylabel="true class (clips)")
    figure.colorbar(image, ax=axis, label="% of the true class's clips", pad=0.02)
    return figure


def _recall_figure(evaluation: Evaluation) -> Figure:
    assert evaluation.confusion is not None
    figure = Figure(figsize=(12, 5.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    recall = evaluation.recall[_best_first(evaluation)]
    left.stairs(recall, np.arange(len(recall) + 1) + 0.5, fill=True, alpha=0.35)
    left.axhline(recall.mean(), color="C1", linestyle="--", linewidth=1, label=f"mean recall {recall.mean():.3f}")
    left.set(xlim=(0.5, len(recall) + 0.5), ylim=(0, 1.02), xlabel="classes, best first", ylabel="recall")
    left.grid(alpha=0.3)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    mistakes = evaluation.confusion.copy()
    np.fill_diagonal(mistakes, 0)
    frequent = np.argsort(-mistakes, axis=None, kind="stable")[:MAX_BARS]
    pairs = [divmod(int(pair), len(mistakes)) for pair in frequent if mistakes.flat[pair]]
    names = [_shorten(name) for name in evaluation.names]
    labels = [f"{names[true]} → {names[predicted]}" for true, predicted in pairs]
    title = "most frequent mistakes: true → predicted" if pairs else "no mistakes"
    _draw_bars(
        right, labels, np.array([mistakes[pair] for pair in pairs]), title=title, label="clips", number="{:,.0f}"
    )
    right.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_bars(axis: Axes, labels: list[str], values: np.ndarray, *, title: str, label: str, number: str) -> None:
    bars = axis.barh(range(len(labels)), values, height=0.7)
    axis.bar_label(bars, fmt=number, padding=3, fontsize="small")
    axis.set_yticks(range(len(labels)), labels, fontsize="small", parse_math=False)
    axis.set_ylim(max(len(labels), 8) - 0.4, -0.6)
    axis.set_axisbelow(True)
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)


def _best_first(evaluation: Evaluation) -> list[int]:
    """Indices of the classes that are in a clip, by recall if there is one, average precision, and number of clips."""
    keys = [-evaluation.positives, -evaluation.average_precision]
    if not evaluation.multi_label:
        keys.append(-evaluation.recall)
    order = np.lexsort(keys)
    return order[evaluation.positives[order] > 0].tolist()


def _mistake(evaluation: Evaluation, index: int) -> str:
    """The class that most clips of a class are wrongly predicted as, with their number; nothing if none is."""
    assert evaluation.confusion is not None
    wrong = evaluation.confusion[index].copy()
    wrong[index] = 0
    return f"{wrong.max():,} {evaluation.names[wrong.argmax()]}" if wrong.any() else ""


def _summary_line(evaluation: Evaluation) -> str:
    metrics = {name: value for name, value in evaluation.summary().items() if not isinstance(value, int)}
    return "   ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _cell(text: str, style: str = "") -> Text:
    """A cell that is cut to the column's width; names are no markup."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL // 2 - 1]}…{name[-MAX_LABEL // 2 :]}"

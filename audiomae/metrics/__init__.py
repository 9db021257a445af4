"""Evaluation of classifiers: scores to metrics, and metrics to tables, files and pictures."""

from audiomae.metrics.report import evaluation_figure, fold_summary, print_table, write_report
from audiomae.metrics.scores import Evaluation, d_prime, evaluate_scores, headline

__all__ = [
    "Evaluation",
    "d_prime",
    "evaluate_scores",
    "evaluation_figure",
    "fold_summary",
    "headline",
    "print_table",
    "write_report",
]

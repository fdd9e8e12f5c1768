"""One plot for each question: bars for figures that stand alone, lines where there is an axis."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.harness import Figures, Question

__all__ = ["draw"]

OURS, THEIRS = "#3572a5", "#b8b8b8"


def draw(question: Question, figures: Figures, directory: Path) -> Path:
    """Draw one question into ``directory``; returns the file."""
    path = directory / f"{question.name}.png"
    if question.axis is None:
        _bars(question, figures)
    else:
        _lines(question, figures)
    plt.tight_layout()
    plt.savefig(path, dpi=110)
    plt.close()
    return path


def _bars(question: Question, figures: Figures) -> None:
    shown = {one.name: figures[one.name, one.at] for one in question.contenders if one.unit is None}
    medians = [statistics.median(values) * question.factor for values in shown.values()]
    low = [m - min(v) * question.factor for m, v in zip(medians, shown.values(), strict=True)]
    high = [max(v) * question.factor - m for m, v in zip(medians, shown.values(), strict=True)]
    _, axes = plt.subplots(figsize=(8, 0.42 * len(shown) + 1.3))
    colors = [OURS if _is_ours(name) else THEIRS for name in shown]
    axes.barh(list(shown), medians, xerr=[low, high], color=colors, ecolor="#555555")
    axes.invert_yaxis()
    # What differs by a hundred times would leave nothing to see of the small ones.
    if max(medians) > 30 * min(medians):
        axes.set_xscale("log")
    for row, value in enumerate(medians):
        axes.annotate(
            f"{value:,.0f}" if value >= 10 else f"{value:.2f}",
            (value, row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.margins(x=0.15)
    axes.set_xlabel(f"{question.unit} ({'more' if question.is_rate else 'less'} is better)")
    axes.set_title(textwrap.fill(question.text, 80), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(question: Question, figures: Figures) -> None:
    series: dict[str, list[tuple[float, list[float]]]] = {}
    for one in question.contenders:
        if one.at is not None and one.unit is None:
            series.setdefault(one.name, []).append((one.at, figures[one.name, one.at]))
    _, axes = plt.subplots(figsize=(8, 4.2))
    for name, points in series.items():
        points.sort()
        style = "-o" if _is_ours(name) else "--s"
        axes.errorbar(
            [at for at, _ in points],
            [statistics.median(v) * question.factor for _, v in points],
            yerr=[
                [(statistics.median(v) - min(v)) * question.factor for _, v in points],
                [(max(v) - statistics.median(v)) * question.factor for _, v in points],
            ],
            fmt=style,
            label=name,
            capsize=2,
        )
    axes.set_xscale("log")
    if question.is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(question.axis)
    axes.set_ylabel(question.unit)
    axes.set_title(textwrap.fill(question.text, 80), fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _is_ours(name: str) -> bool:
    return "handleipc" in name or name in ("handoffs/s", "100,000 at once", "a steady stream")

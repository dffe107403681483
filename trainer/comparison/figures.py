"""Figures of a comparison: bars with significance, smaller shares of labels, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from store.atomic import replace_file
from trainer.comparison.statistics import ALPHA, Row, mean_curve, most_labels, summarise

_FOLDER, _DPI = "figures", 120
_BEST, _EQUIVALENT, _WORSE = "tab:green", "tab:olive", "tab:gray"


def write_figures(results: Sequence[dict[str, Any]], out: str | Path) -> list[Path]:
    """Write PNG files to `out`/figures; returns them.

    They depend on the results alone.
    """
    import matplotlib as mpl

    mpl.use("Agg", force=False)
    folder = Path(out) / _FOLDER
    folder.mkdir(exist_ok=True)
    rows = [row for row in summarise(results) if row.scores]  # not those that always failed
    written = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        main = most_labels(of_task)
        largest = main[0].label_fraction
        written.append(_draw_bars(main, folder / f"{task}.png"))
        validated = [
            result
            for result in results
            if result["task"] == task and result["label_fraction"] == largest and result["curve"]
        ]
        if validated:
            written.append(_draw_curves(validated, folder / f"{task}-curves.png"))
        if len({row.label_fraction for row in of_task}) > 1:
            written.append(_draw_fractions(of_task, folder / f"{task}-labels.png"))
    return written


def _draw_bars(rows: Sequence[Row], file: Path) -> Path:
    """Means with standard deviations, and the score of each trial; stars: worse than the best."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.5 + 0.9 * len(rows), 4), dpi=_DPI)
    positions = np.arange(len(rows))
    means = [100 * row.mean for row in rows]
    spreads = [100 * np.nan_to_num(row.std) for row in rows]
    colours = [_BEST if r.is_best else _EQUIVALENT if r.is_equivalent else _WORSE for r in rows]
    axes.bar(positions, means, yerr=spreads, capsize=4, color=colours, width=0.7, alpha=0.8)
    for position, row in zip(positions, rows, strict=True):
        axes.plot([position] * len(row.scores), [100 * s for s in row.scores], "k.", markersize=4)
        top = 100 * max(row.mean + np.nan_to_num(row.std), *row.scores)
        axes.annotate(_stars(row), (position, top), ha="center", va="bottom")
    values = [100 * score for row in rows for score in row.scores]
    spread = max(float(np.ptp(values)), 1.0)
    low = min(*values, *(m - s for m, s in zip(means, spreads, strict=True)))
    bottom = max(0.0, low - 0.3 * spread)
    axes.set_ylim(bottom, min(105.0, max(values) + 0.4 * spread))
    axes.set_xticks(positions, [row.start for row in rows], rotation=30, ha="right")
    axes.set_ylabel(f"{rows[0].metric} (%)" + (", not from 0" if bottom else ""))
    legend = f"* worse than the best, p < {ALPHA} (t-test); = not significantly different"
    axes.set_title(
        f"{rows[0].task}, trials: {max(len(row.scores) for row in rows)}\n{legend}", fontsize=9
    )
    return _save(figure, file)


def _stars(row: Row) -> str:
    if row.is_best:
        return "best"
    if row.gap_to_best is None or np.isnan(row.gap_to_best.p_student):
        return ""
    if row.is_equivalent:
        return "="
    return "*" * sum(row.gap_to_best.p_student < level for level in (ALPHA, 0.01, 0.001))


def _draw_fractions(rows: Sequence[Row], file: Path) -> Path:
    """Score against the share of labels."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4), dpi=_DPI)
    for start in dict.fromkeys(row.start for row in rows):
        own = sorted((r for r in rows if r.start == start), key=lambda r: r.label_fraction)
        axes.errorbar(
            [100 * row.label_fraction for row in own],
            [100 * row.mean for row in own],
            yerr=[100 * np.nan_to_num(row.std) for row in own],
            marker="o",
            capsize=3,
            label=start,
        )
    axes.set_xlabel("training patients used (%)")
    axes.set_ylabel(f"{rows[0].metric} (%)")
    axes.set_title(rows[0].task, fontsize=9)
    axes.legend(fontsize=8)
    return _save(figure, file)


def _draw_curves(results: Sequence[dict[str, Any]], file: Path) -> Path:
    """Validation score during training: each trial, and their mean.

    results
        Those with a curve, that is, with validation cases.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4), dpi=_DPI)
    for number, start in enumerate(dict.fromkeys(r["start"] for r in results)):
        colour = f"C{number}"
        curves = [r["curve"] for r in results if r["start"] == start]
        for curve in curves:
            steps, scores = np.transpose(curve)
            axes.plot(steps, 100 * scores, color=colour, alpha=0.25, linewidth=0.8)
        steps, scores = mean_curve(curves).T
        axes.plot(steps, 100 * scores, color=colour, label=start)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"validation {results[0]['metric']} (%)")
    axes.set_title(results[0]["task"], fontsize=9)
    axes.legend(fontsize=8)
    return _save(figure, file)


def _save(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    with replace_file(file, shared=True) as partial:
        figure.savefig(partial, metadata={"Software": None})
    pyplot.close(figure)
    return file

"""Tables of a comparison: Markdown for reading, CSV with all numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from store.atomic import replace_file
from store.csvfile import write_csv_file
from trainer.comparison.statistics import (
    ALPHA,
    Difference,
    Pair,
    Row,
    mean_and_std,
    pair_up,
    summarise,
)

TABLES, TABLE = "tables.md", "table.csv"
_PERCENT = 100


def _gap(name: str) -> Callable[[Row], object]:
    """A field of `Row.gap_to_best`; empty for the best."""
    return lambda row: getattr(row.gap_to_best, name) if row.gap_to_best else ""


_COLUMNS: tuple[tuple[str, Callable[[Row], object]], ...] = (
    ("task", attrgetter("task")),
    ("label_fraction", attrgetter("label_fraction")),
    ("start", attrgetter("start")),
    ("metric", attrgetter("metric")),
    ("trials", lambda row: len(row.scores)),
    ("failed", attrgetter("failed")),
    ("mean", attrgetter("mean")),
    ("std", attrgetter("std")),
    ("best", attrgetter("is_best")),
    ("equivalent", attrgetter("is_equivalent")),
    ("behind_best", _gap("mean")),
    ("p_student", _gap("p_student")),
    ("p_welch", _gap("p_welch")),
    ("ci_low", _gap("low")),
    ("ci_high", _gap("high")),
    ("p_holm", attrgetter("p_holm")),
    ("leaked", attrgetter("leaked")),
    ("scores", lambda row: " ".join(map(str, row.scores))),
)
"""Title and cell of each column of table.csv."""


def write_tables(results: Sequence[dict[str, Any]], out: str | Path) -> list[Path]:
    """Write `out`/tables.md and `out`/table.csv; returns the files.

    They depend on the results alone.
    """
    out = Path(out)
    rows, pairs = summarise(results), pair_up(results)
    with replace_file(out / TABLES, shared=True) as partial:
        partial.write_text(to_markdown(rows, pairs), "utf-8")
    cells = ([cell(row) for _, cell in _COLUMNS] for row in rows)
    write_csv_file(out / TABLE, [title for title, _ in _COLUMNS], cells, shared=True)
    return [out / TABLES, out / TABLE]


def to_markdown(rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    """Tables of all starting points, of what classification adds, and of smaller shares of labels.

    The first two are the paper's Result II and Result I.
    """
    if not rows:
        return "No trial has a score yet.\n"
    largest = max(row.label_fraction for row in rows)
    main = [row for row in rows if row.label_fraction == largest]
    blocks = ["# Comparison\n", _starts_section(main), _tests_section(main)]
    gains = [pair for pair in pairs if pair.label_fraction == largest]
    if gains:
        blocks.append(_gains_section(gains))
    if len(main) < len(rows):
        blocks.append(_fractions_section(rows))
    if any(row.failed for row in rows):
        blocks.append(
            "Failed trials diverged (see results.jsonl); they are not in the means and tests.\n"
        )
    return "\n".join(blocks)


def _starts_section(rows: Sequence[Row]) -> str:
    tasks = {row.task: row.metric for row in rows}
    cells = {(row.task, row.start): _cell(row) for row in rows}
    table = _table(
        ["start", *(f"{task}, {metric} %" for task, metric in tasks.items())],
        [
            [start, *(cells.get((task, start), "") for task in tasks)]
            for start in dict.fromkeys(row.start for row in rows)
        ],
    )
    leaks = (
        " † was tested on scans that it was pretrained on." if any(r.leaked for r in rows) else ""
    )
    return (
        f"## Which starting point is best (Result II)\n\n{table}\n"
        "Mean ± standard deviation over trials (number of trials in brackets). The best starting"
        " point of each task is bold; = marks those that are not significantly different from it"
        f" (two-sample t-test, p > {ALPHA}).{leaks}\n"
    )


def _tests_section(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if gap := row.gap_to_best:
            p_values = (gap.p_student, gap.p_welch, row.p_holm)
            body.append(
                [row.task, row.start, _percent(gap.mean), _interval(gap), *map(_p, p_values)]
            )
    table = _table(
        ["task", "start", "behind the best", f"{1 - ALPHA:.0%} interval (Welch)", "p (t-test)",
         "p (Welch)", "p (t-test, Holm)"],
        body,
    )  # fmt: skip
    return (
        f"{table}\nHolm's correction is for the number of starting points compared with the best"
        " of a task. The best was chosen by these same scores, so its lead may be overestimated.\n"
    )


def _gains_section(pairs: Sequence[Pair]) -> str:
    body = []
    for pair in pairs:
        gain = pair.gain
        body.append(
            [pair.task, pair.without, _scores(pair.scores_without), pair.with_,
             _scores(pair.scores_with), _percent(gain.mean, sign=True), _interval(gain),
             _p(gain.p_student), _p(gain.p_welch)]
        )  # fmt: skip
    table = _table(
        ["task", "without", "%", "with", "%", "gain", f"{1 - ALPHA:.0%} interval (Welch)",
         "p (t-test)", "p (Welch)"],
        body,
    )  # fmt: skip
    return f"## What classification adds (Result I)\n\n{table}"


def _fractions_section(rows: Sequence[Row]) -> str:
    blocks = ["## Fewer labels\n"]
    fractions = sorted({row.label_fraction for row in rows})
    for task, metric in {row.task: row.metric for row in rows}.items():
        cells = {(r.start, r.label_fraction): _cell(r) for r in rows if r.task == task}
        body = [
            [start, *(cells.get((start, fraction), "") for fraction in fractions)]
            for start in dict.fromkeys(start for start, _ in cells)
        ]
        header = [f"{task}, {metric} %", *(f"{share:.0%} of labels" for share in fractions)]
        blocks.append(_table(header, body))
    return "\n".join(blocks)


def _cell(row: Row) -> str:
    text = _scores(row.scores, row.failed)
    if row.is_best:
        text = f"**{text}**"
    elif row.is_equivalent:
        text += " ="
    return text + (" †" if row.leaked else "")


def _scores(scores: Sequence[float], failed: int = 0) -> str:
    failures = f"{failed} failed" if failed else ""
    if not scores:
        return failures
    mean, std = mean_and_std(scores)
    spread = "" if math.isnan(std) else f" ± {_percent(std)}"
    trials = ", ".join(filter(None, (str(len(scores)), failures)))
    return f"{_percent(mean)}{spread} ({trials})"


def _percent(value: float, *, sign: bool = False) -> str:
    return f"{_PERCENT * value:{'+' if sign else ''}.2f}"


def _interval(found: Difference) -> str:
    if math.isnan(found.low):
        return "needs two trials"
    return f"{_percent(found.low)} to {_percent(found.high)}"


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"

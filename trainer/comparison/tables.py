"""Tables of a comparison: Markdown for reading, CSV with all numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    mean_and_sample_std,
    most_labels,
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


@dataclass(frozen=True)
class Heading:
    """A heading above texts and tables."""

    heading: str

    def __str__(self) -> str:
        return f"## {self.heading}"


@dataclass(frozen=True)
class Text:
    """A paragraph that tells what a table means."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """Titles of columns, and rows of as many cells; ** around a cell means bold."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = (self.head, ["---"] * len(self.head), *self.rows)
        return "\n".join(
            "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
        )


Block = Heading | Text | Table


def to_markdown(rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    """The blocks of `make_tables` in Markdown."""
    if not rows:
        return "No trial has a score yet.\n"
    return "\n\n".join(["# Comparison", *map(str, make_tables(rows, pairs))]) + "\n"


def make_tables(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[Block]:
    """Tables of all starting points, of what classification adds, and of smaller shares of labels.

    The first two are the paper's Result II and Result I. `rows` must not be empty.
    """
    main = most_labels(rows)
    blocks = [*_compare_starts(main), *_test_starts(main)]
    gains = [pair for pair in pairs if pair.label_fraction == main[0].label_fraction]
    if gains:
        blocks += _compare_pairs(gains)
    if len(main) < len(rows):
        blocks += _compare_fractions(rows)
    if any(row.failed for row in rows):
        blocks.append(
            Text("Failed trials diverged (see results.jsonl); they are not in the means and tests.")
        )
    return blocks


def _compare_starts(rows: Sequence[Row]) -> list[Block]:
    tasks = {row.task: row.metric for row in rows}
    cells = {(row.task, row.start): _cell(row) for row in rows}
    leaks = (
        " † was tested on scans that it was pretrained on." if any(r.leaked for r in rows) else ""
    )
    return [
        Heading("Which starting point is best (Result II)"),
        Table(
            ["start", *(f"{task}, {metric} %" for task, metric in tasks.items())],
            [
                [start, *(cells.get((task, start), "") for task in tasks)]
                for start in dict.fromkeys(row.start for row in rows)
            ],
        ),
        Text(
            "Mean ± standard deviation over trials (number of trials in brackets). The best"
            " starting point of each task is bold; = marks those that are not significantly"
            f" different from it (two-sample t-test, p > {ALPHA}).{leaks}"
        ),
    ]


def _test_starts(rows: Sequence[Row]) -> list[Block]:
    body = []
    for row in rows:
        if gap := row.gap_to_best:
            p_values = (gap.p_student, gap.p_welch, row.p_holm)
            body.append(
                [row.task, row.start, _percent(gap.mean), _interval(gap), *map(_p, p_values)]
            )
    head = ["task", "start", "behind the best", f"{1 - ALPHA:.0%} interval (Welch)", "p (t-test)",
            "p (Welch)", "p (t-test, Holm)"]  # fmt: skip
    return [
        Table(head, body),
        Text(
            "Holm's correction is for the number of starting points compared with the best of a"
            " task. The best was chosen by these same scores, so its lead may be overestimated."
        ),
    ]


def _compare_pairs(pairs: Sequence[Pair]) -> list[Block]:
    body = []
    for pair in pairs:
        gain = pair.gain
        body.append(
            [pair.task, pair.without, _scores(pair.scores_without), pair.with_,
             _scores(pair.scores_with), _percent(gain.mean, sign=True), _interval(gain),
             _p(gain.p_student), _p(gain.p_welch)]
        )  # fmt: skip
    head = ["task", "without", "%", "with", "%", "gain", f"{1 - ALPHA:.0%} interval (Welch)",
            "p (t-test)", "p (Welch)"]  # fmt: skip
    return [Heading("What classification adds (Result I)"), Table(head, body)]


def _compare_fractions(rows: Sequence[Row]) -> list[Block]:
    blocks: list[Block] = [Heading("Fewer labels")]
    fractions = sorted({row.label_fraction for row in rows})
    for task, metric in {row.task: row.metric for row in rows}.items():
        cells = {(r.start, r.label_fraction): _cell(r) for r in rows if r.task == task}
        body = [
            [start, *(cells.get((start, fraction), "") for fraction in fractions)]
            for start in dict.fromkeys(start for start, _ in cells)
        ]
        head = [f"{task}, {metric} %", *(f"{share:.0%} of labels" for share in fractions)]
        blocks.append(Table(head, body))
    return blocks


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
    mean, std = mean_and_sample_std(scores)
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

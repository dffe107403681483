"""Tables of a comparison: Markdown for reading, CSV with all numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from store.atomic import replace_file
from store.csvfile import write_csv
from trainer.comparison.statistics import ALPHA, Difference, Pair, Row, pair_up, summarise

TABLES, TABLE = "tables.md", "table.csv"
_PERCENT = 100


def write_tables(results: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write `out`/tables.md and `out`/table.csv; returns the files.

    They depend on the results alone.
    """
    rows, pairs = summarise(results), pair_up(results)
    with replace_file(out / TABLES, shared=True) as partial:
        partial.write_text(to_markdown(rows, pairs), "utf-8")
    header = (
        "task", "label_fraction", "start", "metric", "trials", "failed", "mean", "std", "best",
        "equivalent", "behind_best", "p_student", "p_welch", "ci_low", "ci_high", "p_holm",
        "leaked", "scores",
    )  # fmt: skip
    with (
        replace_file(out / TABLE, shared=True) as partial,
        partial.open("w", newline="", encoding="utf-8") as stream,
    ):
        write_csv(stream, header, map(_list_cells, rows))
    return [out / TABLES, out / TABLE]


def _list_cells(row: Row) -> list[object]:
    behind = row.behind
    difference = (
        [behind.mean, behind.p_student, behind.p_welch, behind.low, behind.high]
        if behind
        else [""] * 5
    )
    return [
        row.task, row.label_fraction, row.start, row.metric, len(row.scores), row.failed, row.mean,
        row.std, row.is_best, row.is_equivalent, *difference, row.p_holm, row.leaked,
        " ".join(map(str, row.scores)),
    ]  # fmt: skip


def to_markdown(rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    """Tables of all starts, of what classification adds, and of smaller shares of labels.

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
        f"## Which start is best (Result II)\n\n{table}\n"
        "Mean ± standard deviation over trials (number of trials in brackets). The best start of"
        " each task is bold; = marks starts that are not significantly different from it"
        f" (two-sample t-test, p > {ALPHA}).{leaks}\n"
    )


def _tests_section(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row.behind is not None:
            behind = row.behind
            p_values = (behind.p_student, behind.p_welch, row.p_holm)
            body.append(
                [row.task, row.start, _percent(behind.mean), _interval(behind), *map(_p, p_values)]
            )
    table = _table(
        ["task", "start", "behind the best", f"{1 - ALPHA:.0%} interval (Welch)", "p (t-test)",
         "p (Welch)", "p (t-test, Holm)"],
        body,
    )  # fmt: skip
    return (
        f"{table}\nHolm's correction is for the number of starts compared with the best of a"
        " task. The best was chosen by these same scores, so its lead may be overestimated.\n"
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
    spread = f" ± {_percent(float(np.std(scores, ddof=1)))}" if len(scores) > 1 else ""
    trials = ", ".join(filter(None, (str(len(scores)), failures)))
    return f"{_percent(float(np.mean(scores)))}{spread} ({trials})"


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

"""A comparison as people read it: Markdown with the two tables, CSV with every number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from store.csvfile import write_csv
from trainer.comparison.statistics import ALPHA, Pair, Row, pair_up, summarise

TABLES, TABLE = "tables.md", "table.csv"
_PERCENT = 100


def write_tables(results: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write `out`/tables.md and `out`/table.csv from the results alone; returns the files."""
    rows, pairs = summarise(results), pair_up(results)
    (out / TABLES).write_text(to_markdown(rows, pairs), "utf-8")
    header = (
        "task", "label_fraction", "start", "metric", "trials", "failed", "mean", "std", "best",
        "equivalent", "behind_best", "p_student", "p_welch", "ci_low", "ci_high", "p_holm",
        "leaked", "scores",
    )  # fmt: skip
    with (out / TABLE).open("w", newline="", encoding="utf-8") as stream:
        write_csv(stream, header, map(_list_cells, rows))
    return [out / TABLES, out / TABLE]


def _list_cells(row: Row) -> list[object]:
    behind = row.behind
    told = (
        [behind.mean, behind.p_student, behind.p_welch, behind.low, behind.high]
        if behind
        else [""] * 5
    )
    return [
        row.task, row.label_fraction, row.start, row.metric, len(row.scores), row.failed, row.mean,
        row.std, row.is_best, row.is_equivalent, *told, row.p_holm, row.leaked,
        " ".join(map(str, row.scores)),
    ]  # fmt: skip


def to_markdown(rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    """Result II (every start), Result I (with against without classification), few labels."""
    if not rows:
        return "No trial has a score yet.\n"
    most = max(row.label_fraction for row in rows)
    whole = [row for row in rows if row.label_fraction == most]
    blocks = ["# Comparison\n", _tell_starts(whole), _tell_tests(whole)]
    gains = [pair for pair in pairs if pair.label_fraction == most]
    if gains:
        blocks.append(_tell_gains(gains))
    if len(whole) < len(rows):
        blocks.append(_tell_fractions(rows))
    if any(row.failed for row in rows):
        blocks.append(
            "Failed trials diverged (results.jsonl says where); means and tests leave them out.\n"
        )
    return "\n".join(blocks)


def _tell_starts(rows: Sequence[Row]) -> str:
    tasks = {row.task: row.metric for row in rows}
    cells = {(row.task, row.start): _cell(row) for row in rows}
    table = _table(
        ["start", *(f"{task}, {metric} %" for task, metric in tasks.items())],
        [
            [start, *(cells.get((task, start), "") for task in tasks)]
            for start in dict.fromkeys(row.start for row in rows)
        ],
    )
    leaks = " † tested on scans that it was pretrained on." if any(r.leaked for r in rows) else ""
    return (
        f"## Which start is best (Result II)\n\n{table}\n"
        "Mean ± standard deviation over trials (their number in brackets); of each task the best in"
        " bold, and = where a two-sample t-test does not tell a start from it"
        f" (p > {ALPHA}).{leaks}\n"
    )


def _tell_tests(rows: Sequence[Row]) -> str:
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
        f"{table}\nHolm corrects for the number of starts compared with the best of a task. The"
        " best was chosen by these same scores, so its lead is, if anything, shown too large.\n"
    )


def _tell_gains(pairs: Sequence[Pair]) -> str:
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


def _tell_fractions(rows: Sequence[Row]) -> str:
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
    mean = sum(scores) / len(scores)
    spread = ""
    if len(scores) > 1:
        variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
        spread = f" ± {_percent(math.sqrt(variance))}"
    trials = ", ".join(filter(None, (str(len(scores)), failures)))
    return f"{_percent(mean)}{spread} ({trials})"


def _percent(value: float, *, sign: bool = False) -> str:
    return f"{_PERCENT * value:{'+' if sign else ''}.2f}"


def _interval(found: Any) -> str:
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

"""Collect a comparison for its page: its tables, and the numbers behind its figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.comparison.results import read_results
from trainer.comparison.statistics import (
    Difference,
    Row,
    mean_curve,
    most_labels,
    pair_up,
    summarise,
)
from trainer.comparison.tables import make_tables
from trainer.errors import TrainError


def describe_comparison(folder: Path) -> dict[str, Any]:
    """What the page shows of a comparison; TrainError where no trial is done yet."""
    results = read_results(folder)
    rows = summarise(results)
    tasks = dict.fromkeys(row.task for row in rows)
    if not any(row.scores for row in rows):
        raise TrainError(f"{folder}: no trial has a score yet; run semgen compare until one has")
    return {
        "tables": [asdict(block) for block in make_tables(rows, pair_up(results))],
        "tasks": [_describe_task(task, rows, results) for task in tasks],
        "trials": len(results),
    }


def _describe_task(task: str, rows: list[Row], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores of each starting point with all labels and with fewer, and curves of validation."""
    own = [row for row in rows if row.task == task and row.scores]
    main = most_labels(own)
    return {
        "name": task,
        "metric": own[0].metric if own else "",
        "starts": [
            {
                "name": row.start,
                "scores": row.scores,
                "mean": row.mean,
                "std": row.std,
                "best": row.is_best,
                "equivalent": row.is_equivalent,
                "leaked": row.leaked,
                "gap": _describe_gap(row.gap_to_best),
            }
            for row in main
        ],
        "fractions": [
            {"name": start, "points": sorted(
                [row.label_fraction, row.mean] for row in own if row.start == start)}
            for start in dict.fromkeys(row.start for row in own)
        ] if len({row.label_fraction for row in own}) > 1 else [],
        "curves": [
            {"name": row.start, "points": mean_curve(curves).round(5).tolist()} for row in main
            if (curves := [
                r["curve"] for r in results if r["curve"] and (r["task"], r["start"],
                r["label_fraction"]) == (task, row.start, row.label_fraction)])
        ],
    }  # fmt: skip


def _describe_gap(gap: Difference | None) -> dict[str, float] | None:
    """The starting point minus the best one, with its 95 % interval."""
    if gap is None:
        return None
    return {
        "mean": -gap.mean,
        "low": -gap.high,
        "high": -gap.low,
        "p": gap.p_student,
    }

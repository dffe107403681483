"""Statistics of trials: means, and tests whether starting points differ, for each task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The difference between two samples of scores."""

    mean: float
    """Mean of the second sample minus mean of the first."""
    p_student: float
    """p of the two-sided two-sample t-test with equal variances, as published; NaN where a sample
    has fewer than two scores."""
    p_welch: float
    """p of Welch's t-test, which does not assume equal variances."""
    low: float
    high: float
    """95 % confidence interval of the difference (Welch)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The scores of one starting point on one task."""

    task: str
    start: str
    label_fraction: float
    metric: str
    scores: tuple[float, ...]
    """One for each trial; empty where all failed."""
    failed: int
    """Number of trials that diverged; they are not in `scores` and not in any test."""
    is_best: bool
    gap_to_best: Difference | None
    """The best starting point of the task minus this one; None for the best."""
    p_holm: float
    """`gap_to_best.p_student` corrected for the number of starting points (Holm); NaN where
    there is none."""
    leaked: bool
    """Whether the weights were pretrained on some test case."""

    @property
    def mean(self) -> float:
        """Mean over trials; NaN without any."""
        return mean_and_sample_std(self.scores)[0]

    @property
    def std(self) -> float:
        """Sample standard deviation over trials; NaN for fewer than two."""
        return mean_and_sample_std(self.scores)[1]

    @property
    def is_equivalent(self) -> bool:
        """The best, or not significantly different from it (p > 0.05, as published)."""
        return self.is_best or (self.gap_to_best is not None and self.gap_to_best.p_student > ALPHA)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A starting point with and without the classification loss (the paper's Result I)."""

    task: str
    label_fraction: float
    metric: str
    without: str
    with_: str
    scores_without: tuple[float, ...]
    scores_with: tuple[float, ...]
    gain: Difference
    """With classification minus without."""


def mean_and_sample_std(scores: Sequence[float]) -> tuple[float, float]:
    """Mean, NaN without scores; sample standard deviation, NaN for fewer than two."""
    mean = float(np.mean(scores)) if scores else math.nan
    return mean, float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan


def most_labels(rows: Sequence[Row]) -> list[Row]:
    """The rows with the largest share of labels."""
    largest = max((row.label_fraction for row in rows), default=1.0)
    return [row for row in rows if row.label_fraction == largest]


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> NDArray[np.float64]:
    """(n, 2) mean of one or more curves of (step, score), at all of their steps."""
    tables = [np.array(curve, float) for curve in curves]
    steps = np.unique(np.concatenate([table[:, 0] for table in tables]))
    found = [np.interp(steps, table[:, 0], table[:, 1]) for table in tables]
    return np.stack([steps, np.mean(found, axis=0)], axis=1)


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """The difference of means, other minus one, with t-tests and a confidence interval."""
    gap = float(np.mean(other) - np.mean(one))
    if min(len(one), len(other)) < 2:
        return Difference(
            mean=gap, p_student=math.nan, p_welch=math.nan, low=math.nan, high=math.nan
        )
    if np.ptp(one) == 0 and np.ptp(other) == 0:  # no variance, so no test
        p = 1.0 if gap == 0 else 0.0
        return Difference(mean=gap, p_student=p, p_welch=p, low=gap, high=gap)
    welch = stats.ttest_ind(other, one, equal_var=False)
    interval = welch.confidence_interval(1 - ALPHA)
    return Difference(
        mean=gap,
        p_student=float(stats.ttest_ind(other, one).pvalue),
        p_welch=float(welch.pvalue),
        low=float(interval.low),
        high=float(interval.high),
    )


def correct(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction; NaN stays NaN and is not counted."""
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(known) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def summarise(results: Iterable[dict[str, Any]]) -> list[Row]:
    """One row for each task, share of labels and starting point, in the order of the results."""
    trials = _gather(results)
    rows = []
    for task, fraction in dict.fromkeys((t, f) for t, f, _ in trials):
        found = {s: v for (t, f, s), v in trials.items() if (t, f) == (task, fraction)}
        scored = {start: v["scores"] for start, v in found.items() if v["scores"]}
        best = max(scored, key=lambda start: float(np.mean(scored[start])), default=None)
        gaps = {
            start: difference(scores, scored[best])
            for start, scores in scored.items()
            if best is not None and start != best
        }
        holm = dict(zip(gaps, correct([d.p_student for d in gaps.values()]), strict=True))
        rows += [
            Row(
                task=task,
                start=start,
                label_fraction=fraction,
                metric=v["metric"],
                scores=tuple(v["scores"]),
                failed=v["failed"],
                is_best=start == best,
                gap_to_best=gaps.get(start),
                p_holm=holm.get(start, math.nan),
                leaked=v["leaked"],
            )
            for start, v in found.items()
        ]
    return rows


def pair_up(results: Iterable[dict[str, Any]]) -> list[Pair]:
    """One pair for each starting point that adds the classification loss to another."""
    trials = _gather(results)
    pairs = []
    for (task, fraction, start), v in trials.items():
        base = trials.get((task, fraction, v["adds_to"]))
        if base is not None and base["scores"] and v["scores"]:
            pairs.append(
                Pair(
                    task=task,
                    label_fraction=fraction,
                    metric=v["metric"],
                    without=v["adds_to"],
                    with_=start,
                    scores_without=tuple(base["scores"]),
                    scores_with=tuple(v["scores"]),
                    gain=difference(base["scores"], v["scores"]),
                )
            )
    return pairs


def _gather(results: Iterable[dict[str, Any]]) -> dict[tuple[str, float, str], dict[str, Any]]:
    """Scores by task, share of labels and starting point: a trial's is the mean of its test cases.

    With cross-validation a trial counts when it has as many folds as any trial of its task, and
    has failed when one of them has.
    """
    folds: dict[tuple[str, float, str, int], list[dict[str, Any]]] = {}
    for result in results:
        if result["score"] is not None or result.get("failed"):
            key = (result["task"], result["label_fraction"], result["start"], result["trial"])
            folds.setdefault(key, []).append(result)
    num_folds: dict[str, int] = {}
    for (task, *_), found in folds.items():
        num_folds[task] = max(num_folds.get(task, 0), len(found))
    gathered: dict[tuple[str, float, str], dict[str, Any]] = {}
    for (task, fraction, start, _), found in folds.items():
        failed = any(result.get("failed") for result in found)
        if len(found) < num_folds[task] and not failed:
            continue
        first = found[0]
        entry = gathered.setdefault(
            (task, fraction, start),
            {"scores": [], "failed": 0, "leaked": False,
             "metric": first["metric"], "adds_to": first["adds_to"]},
        )  # fmt: skip
        if failed:
            entry["failed"] += 1
            continue
        cases = [result["num_test"] for result in found]
        entry["scores"].append(float(np.average([r["score"] for r in found], weights=cases)))
        entry["leaked"] |= any(result["leaked"] for result in found)
    return gathered

"""Statistics of trials, and the tables and figures made from them."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from trainer.comparison import read_results, write_figures, write_tables
from trainer.comparison.statistics import correct, difference, pair_up, summarise
from trainer.comparison.tables import to_markdown

# Statistics

ONE, OTHER = [0.71, 0.74, 0.69, 0.73], [0.78, 0.75, 0.80, 0.77, 0.79]


def test_differences_equal_those_of_scipy() -> None:
    found = difference(ONE, OTHER)
    assert found.mean == pytest.approx(np.mean(OTHER) - np.mean(ONE))
    assert found.p_student == pytest.approx(stats.ttest_ind(ONE, OTHER).pvalue)
    assert found.p_welch == pytest.approx(stats.ttest_ind(ONE, OTHER, equal_var=False).pvalue)


def test_differences_equal_the_textbook_formulas() -> None:
    """By hand, from means, variances and the quantile of t."""
    n, m = len(ONE), len(OTHER)
    a, b = np.var(ONE, ddof=1) / n, np.var(OTHER, ddof=1) / m
    freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
    gap = np.mean(OTHER) - np.mean(ONE)
    found = difference(ONE, OTHER)
    assert (found.low, found.high) == pytest.approx((gap - reach, gap + reach))
    assert found.p_welch == pytest.approx(2 * stats.t.sf(gap / math.sqrt(a + b), freedom))


def test_a_single_trial_gives_no_p_value() -> None:
    found = difference([0.5], [0.9])
    assert found.mean == pytest.approx(0.4)
    assert math.isnan(found.p_student)
    assert math.isnan(found.low)


def test_samples_without_variance_give_p_0_or_1() -> None:
    assert difference([0.5, 0.5], [0.5, 0.5]).p_student == 1
    assert difference([0.5, 0.5], [0.6, 0.6]).p_welch == 0


def test_holms_correction_on_known_numbers() -> None:
    """The example of Holm's correction: 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02."""
    assert correct([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct([0.9, math.nan, 0.8])[::2] == [1.0, 1.0]


# From results to tables


def make_result(start: str, trial: int, score: float, **more: Any) -> dict[str, Any]:
    return {
        "task": "liver", "start": start, "label_fraction": 1.0, "trial": trial, "fold": 0,
        "order": ["scratch", "restoration", "joint"].index(start),
        "adds_to": "restoration" if start == "joint" else None,
        "metric": "dice", "score": score, "num_test": 4, "leaked": [],
        "curve": [[10, score / 2], [20, score]], **more,
    }  # fmt: skip


SCORES = {
    "scratch": [0.60, 0.62, 0.61],
    "restoration": [0.70, 0.74, 0.72],
    "joint": [0.73, 0.75, 0.74],
}
RESULTS = [make_result(start, n, s) for start, found in SCORES.items() for n, s in enumerate(found)]


def test_the_best_start_and_those_not_significantly_different() -> None:
    rows = {row.start: row for row in summarise(RESULTS)}
    assert [row.start for row in rows.values() if row.is_best] == ["joint"]
    p = stats.ttest_ind(SCORES["joint"], SCORES["restoration"]).pvalue
    assert p > 0.05
    assert rows["restoration"].is_equivalent
    assert not rows["scratch"].is_equivalent
    assert rows["scratch"].std == pytest.approx(np.std(SCORES["scratch"], ddof=1))


def test_a_start_is_paired_with_the_one_that_it_adds_to() -> None:
    (pair,) = pair_up(RESULTS)
    assert (pair.without, pair.with_) == ("restoration", "joint")
    assert pair.gain.mean == pytest.approx(0.02)


def test_the_score_of_a_trial_is_the_mean_over_its_folds_weighted_by_cases() -> None:
    folded = [
        make_result("scratch", 0, 0.5, num_test=1),
        make_result("scratch", 0, 0.8, num_test=2, fold=1),
        make_result("scratch", 1, 0.9, num_test=1),  # its other fold is not done yet
    ]
    (row,) = summarise(folded)
    assert row.scores == (pytest.approx(0.7),)


def test_the_markdown_table_has_means_deviations_and_marks() -> None:
    text = to_markdown(summarise(RESULTS), pair_up(RESULTS))
    assert "| joint | **74.00 ± 1.00 (3)** |" in text
    assert "| restoration | 72.00 ± 2.00 (3) = |" in text
    assert "| scratch | 61.00 ± 1.00 (3) |" in text
    assert "| liver | restoration | 72.00 ± 2.00 (3) | joint | 74.00 ± 1.00 (3) | +2.00 |" in text


def test_leaked_scores_are_marked() -> None:
    leaked = [{**r, "leaked": ["a"]} if r["start"] == "joint" else r for r in RESULTS]
    text = to_markdown(summarise(leaked), [])
    assert "**74.00 ± 1.00 (3)** †" in text
    assert "† was tested on scans that it was pretrained on" in text


def test_figures_and_tables_depend_on_the_results_alone(tmp_path: Path) -> None:
    few = [{**r, "label_fraction": 0.1, "score": r["score"] / 2} for r in RESULTS]
    lines = [json.dumps(result) for result in (*RESULTS, *few)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("\n".join(lines) + '\n{"half a li')
        results = read_results(tmp_path / name)
        assert len(results) == 18
        write_tables(results, tmp_path / name)
        write_figures(results, tmp_path / name)
        lines.reverse()
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert {"liver.png", "liver-labels.png", "liver-curves.png", "tables.md", "table.csv"} <= {
        name.name for name in names
    }
    for name in names:
        if name.name != "results.jsonl":
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    blind = [{**result, "curve": []} for result in RESULTS]  # no validation cases
    assert [file.name for file in write_figures(blind, tmp_path)] == ["liver.png"]
    assert "10% of labels" in (tmp_path / "one" / "tables.md").read_text()


def fail(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "score": None, "failed": "loss is nan at step 3", "curve": []}


def test_failed_trials_are_counted_and_not_in_the_mean() -> None:
    results = [fail(RESULTS[0]), *RESULTS[1:]]
    row = next(row for row in summarise(results) if row.start == "scratch")
    assert (row.scores, row.failed) == ((0.62, 0.61), 1)
    assert "| scratch | 61.50 ± 0.71 (2, 1 failed) |" in to_markdown(summarise(results), [])


def test_a_start_that_always_fails_is_shown_without_a_comparison(tmp_path: Path) -> None:
    results = [fail(r) if r["start"] == "joint" else r for r in RESULTS]
    rows = summarise(results)
    assert [row.start for row in rows if row.is_best] == ["restoration"]
    assert pair_up(results) == []
    text = to_markdown(rows, pair_up(results))
    assert "| joint | 3 failed |" in text
    assert "Failed trials diverged" in text
    write_tables(results, tmp_path)
    with (tmp_path / "table.csv").open() as stream:
        table = {row["start"]: row for row in csv.DictReader(stream)}
    assert {start: row["failed"] for start, row in table.items()} == {
        "scratch": "0", "restoration": "0", "joint": "3"}  # fmt: skip
    assert [file.name for file in write_figures(results, tmp_path)] == [
        "liver.png", "liver-curves.png"]  # fmt: skip


def test_without_any_score_there_are_tables_and_no_figures(tmp_path: Path) -> None:
    results = [fail(result) for result in RESULTS]
    assert "| scratch | 3 failed |" in to_markdown(summarise(results), pair_up(results))
    assert write_figures(results, tmp_path) == []


def test_a_trial_with_a_failed_fold_has_failed() -> None:
    """Also where no trial has all folds: part of a trial is not compared with complete ones."""
    folded = [
        make_result("scratch", 0, 0.5),
        fail(make_result("scratch", 0, 0.0, fold=1)),
    ]
    (row,) = summarise(folded)
    assert (row.scores, row.failed) == ((), 1)


def test_text_in_the_csv_table_is_not_a_formula_for_spreadsheets(tmp_path: Path) -> None:
    results = [{**result, "start": "-" + result["start"]} for result in RESULTS]
    write_tables(results, tmp_path)
    with (tmp_path / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["start"] for row in rows] == ["'-scratch", "'-restoration", "'-joint"]
    assert all(float(row["mean"]) > 0 for row in rows)

"""Comparison: statistics, tables and figures, plans, and running the trials."""

import contextlib
import csv
import errno
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from scipy import stats

from cli import main
from tests.conftest import ROOT
from tests.support.finetuning import RecordedProgress, draw_case, write_manifest
from trainer import TrainError
from trainer.comparison import compare, read_results, write_figures, write_tables
from trainer.comparison import trials as running
from trainer.comparison.plan import list_trials, read_plan
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


# Plans


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of six images, and a plan of two starts and two trials."""
    import SimpleITK as sitk  # noqa: N813

    folder = tmp_path_factory.mktemp("comparison")
    rows: list[dict[str, object]] = []
    for number in range(6):
        for name, image in zip(("image", "mask"), draw_case(number), strict=True):
            sitk.WriteImage(image, str(folder / f"{number}_{name}.nii.gz"))
        rows.append({"image": f"{number}_image.nii.gz", "mask": f"{number}_mask.nii.gz"})
    write_manifest(folder / "balls.csv", rows)
    (folder / "plan.toml").write_text(PLAN)
    return folder


PLAN = """
trials = 2

[defaults]
width = 2
shape = [8, 16, 16]
batch_size = 4
steps = 3
device = "cpu"

[tasks.balls]
path = "balls.csv"
folds = 2

[starts.scratch]

[starts.faster]
learning_rate = 0.01
adds_to = "scratch"
"""


def test_trials_differ_in_seed_and_share_the_split(folder: Path) -> None:
    plan = read_plan(folder / "plan.toml")
    trials = list_trials(plan)
    assert len(trials) == 2 * 2 * 2
    assert {trial.config.seed for trial in trials} == {0, 1}
    assert {trial.config.split_seed for trial in trials} == {0}
    assert {t.config.learning_rate for t in trials if t.start == "faster"} == {0.01}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[tasks.balls]", "[task.balls]", "unknown setting task; did you mean tasks"),
        ("trials = 2", "trials = 1.5", "trials must be a whole number, got 1.5"),
        ("trials = 2", 'trials = "many"', "trials must be a whole number, got 'many'"),
        ("trials = 2", "trials = 0", "trials must be >= 1"),
        ("trials = 2", "label_fractions = 0.5", "label_fractions must be a list of numbers"),
        ("trials = 2", "label_fractions = []", "label_fractions must be in"),
        ("trials = 2", "label_fractions = [0.5, 1.5]", "label_fractions must be in"),
        ("trials = 2", "label_fractions = [0.5, 0.5]", "label_fractions must differ"),
        ("trials = 2", 'keep_weights = "no"', "keep_weights must be true or false, got 'no'"),
        ("trials = 2", "trails = 2", "unknown setting trails; did you mean trials"),
        (
            '[tasks.balls]\npath = "balls.csv"\nfolds = 2',
            "[tasks]\nballs = 3",
            "tasks.balls must be a table",
        ),
        ('path = "balls.csv"', "path = 3", "task balls: path must be text, got 3"),
        ('path = "balls.csv"', "", "task balls: needs a path"),
        (
            'path = "balls.csv"',
            'path = "balls.csv"\ninit = "x"',
            r"init cannot be set here: .* \[starts.NAME\]",
        ),
        ("folds = 2", "folds = 2\nfold = 1", "fold cannot be set here: every fold is run"),
        ("width = 2", f"seed = {2**63 - 1}", r"seed \+ trials must be at most 2\^63"),
        ("folds = 2", "split_seed = -1", "split_seed must be >= 0"),
        (
            "folds = 2",
            'folds = 2\nintensity = "unit"\nwindow_hu = [0, 1]',
            "task balls, start scratch: .* the window has no effect",
        ),
        ("folds = 2", "test_fraction = 0", "there are no test cases"),
        (
            "[starts.scratch]",
            '[starts.scratch]\ninit = "runs/no"',
            "start scratch: init: .*runs/no: no such file",
        ),
        ("width = 2", "widht = 2", "unknown setting widht; did you mean width"),
        ("width = 2", 'mirror = "no"', "mirror must be true or false, got 'no'"),
        ("width = 2", "threads = 1.5", "threads must be a whole number, got 1.5"),
        (
            "width = 2",
            "seed = 1.5",
            "task balls, start scratch: seed must be a whole number, got 1.5",
        ),
        ("width = 2", 'seed = "a"', "seed must be a whole number, got 'a'"),
        ("width = 2", "window_hu = [1]", "window_hu must be a list of 2 numbers, got"),
        ("width = 2", 'window_hu = [1, "a"]', "window_hu must be a list of 2 numbers, got"),
        ("width = 2", 'label_fraction = "half"', "label_fraction must be a number, got 'half'"),
        ("folds = 2", 'folds = "two"', "folds must be a whole number, got 'two'"),
        ("width = 2", "width = 0", "task balls, start scratch: width must be >= 1"),
        ('adds_to = "scratch"', 'adds_to = "none"', "adds_to 'none' is not a start"),
        ('path = "balls.csv"', 'path = "no.csv"', "no such task"),
        ("trials = 2", "trials = ", "cannot be read as TOML"),
        ("folds = 2", 'folds = 2\nmetric = "size"', "metric must be one of dice, iou"),
        ("folds = 2", 'folds = 2\nmetric = "auc"', "segmentation: metric must be one of dice, iou"),
    ],
)
def test_an_invalid_plan_is_refused(folder: Path, old: str, new: str, says: str) -> None:
    file = folder / "broken.toml"
    file.write_text(PLAN.replace(old, new))
    with pytest.raises(TrainError, match=f"broken.toml.*{says}"):
        read_plan(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tasks = 3\n[starts.scratch]", "tasks must be a table, got 3"),
        ("defaults = 3\n[starts.scratch]", "defaults must be a table, got 3"),
        ('[tasks.balls]\npath = "balls.csv"', "has no starts"),
        ("[starts.scratch]", "has no tasks"),
    ],
)
def test_a_plan_without_its_tables_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(TrainError, match=says):
        read_plan(tmp_path / "plan.toml")


@pytest.mark.parametrize("name", ["", ".", "..", "...", "../x", "a/b", "a b", "-"])
@pytest.mark.parametrize("table", ["[tasks.balls]", "[starts.faster]"])
def test_names_that_cannot_name_a_folder_are_refused(folder: Path, table: str, name: str) -> None:
    file = folder / "named.toml"
    file.write_text(PLAN.replace(table, f'{table.partition(".")[0]}."{name}"]'))
    with pytest.raises(TrainError, match="must be a plain name"):
        read_plan(file)


@pytest.mark.parametrize(
    ("labels", "metric", "says"),
    [
        ("ababab", "dice", "classification: metric must be one of auc, accuracy, got 'dice'"),
        ("aaaabb", "auc", "all test cases have the same label"),
    ],
)
def test_a_metric_that_the_test_cases_cannot_give_is_refused(
    folder: Path, labels: str, metric: str, says: str
) -> None:
    splits = ["test", "test", "train", "train", "train", "train"]
    write_manifest(
        folder / "kinds.csv",
        [
            {"image": f"{number}_image.nii.gz", "label": label, "split": split}
            for number, (label, split) in enumerate(zip(labels, splits, strict=True))
        ],
    )
    file = folder / "kinds.toml"
    file.write_text(
        PLAN.replace("balls.csv", "kinds.csv").replace("folds = 2", f'metric = "{metric}"')
    )
    with pytest.raises(TrainError, match=says):
        read_plan(file)


@pytest.fixture(scope="module")
def compared(folder: Path) -> Path:
    compare(folder / "plan.toml", folder / "whole")
    return folder / "whole"


def test_every_trial_has_a_result(compared: Path) -> None:
    results = read_results(compared)
    assert len(results) == 8
    assert all(0 <= result["score"] <= 1 and result["num_test"] == 3 for result in results)
    assert not list(compared.rglob("best.pt")), "weights are not kept"
    assert list((compared / "trials").rglob("test/*.nii.gz")), "masks of the first trial are"


def test_trials_that_are_done_are_not_run_again(folder: Path, compared: Path) -> None:
    before = (compared / "results.jsonl").read_bytes()
    compare(folder / "plan.toml", compared)
    assert (compared / "results.jsonl").read_bytes() == before


@contextlib.contextmanager
def running_command(folder: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command in another process, after its first trial is done."""
    command = [
        sys.executable,
        "-m",
        "cli",
        "compare",
        str(folder / "plan.toml"),
        str(out),
        *options,
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 120
        while not read_results(out) and time.monotonic() < until:
            time.sleep(0.02)
        yield process


def find_workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_a_killed_and_resumed_comparison_equals_an_uninterrupted_one(
    folder: Path, compared: Path
) -> None:
    """Killed with SIGKILL in the middle of training."""
    out = folder / "killed"
    with running_command(folder, out) as process:
        process.kill()
    assert 0 < len(read_results(out)) < 8
    compare(folder / "plan.toml", out)
    assert read_results(out) == read_results(compared)


def test_an_incomplete_line_is_run_again_and_does_not_harm_others(
    folder: Path, compared: Path
) -> None:
    out = folder / "half"
    shutil.copytree(compared, out)
    lines = (compared / "results.jsonl").read_bytes().splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert compare(folder / "plan.toml", out) == read_results(compared)


def test_several_processes_share_the_work(folder: Path, compared: Path) -> None:
    progress = RecordedProgress()
    results = compare(
        folder / "plan.toml",
        folder / "shared",
        devices=("cpu", "cpu"),
        progress=progress,
    )
    assert progress.stages == [("compare", 8, 0)]
    assert sum(progress.increments["compare"]) == 8
    lines = (folder / "shared" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 8, "no trial was done twice"
    for one, other in zip(results, read_results(compared), strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=0.02)  # threads differ


def test_a_process_that_dies_is_reported(folder: Path) -> None:
    """As when memory runs out; the others do not wait for it."""
    with running_command(folder, folder / "died", "--devices", "cpu,cpu") as process:
        find_workers(process)[0].kill()
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a process died" in printed


def test_worker_processes_end_when_their_parent_is_killed(folder: Path) -> None:
    with running_command(folder, folder / "orphaned", "--devices", "cpu,cpu") as process:
        workers = find_workers(process)
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
    assert len(workers) == 2
    assert not alive


def test_progress_does_not_count_trials_of_an_earlier_call(folder: Path, compared: Path) -> None:
    partly = folder / "partly"
    shutil.copytree(compared, partly)
    lines = (partly / "results.jsonl").read_text().splitlines(keepends=True)
    (partly / "results.jsonl").write_text("".join(lines[:6]))
    progress = RecordedProgress()
    compare(folder / "plan.toml", partly, progress=progress)
    assert progress.stages == [("compare", 8, 6)]
    assert progress.increments == {"compare": [1, 1]}


def test_other_settings_need_another_folder(folder: Path, compared: Path) -> None:
    file = folder / "other.toml"
    file.write_text(PLAN.replace("learning_rate = 0.01", "learning_rate = 0.02"))
    with pytest.raises(TrainError, match=r"learning_rate 0\.01 -> 0\.02"):
        compare(file, compared)


def test_trials_can_be_added_to_a_comparison(folder: Path, compared: Path) -> None:
    more = folder / "more"
    shutil.copytree(compared, more)
    file = folder / "more.toml"
    file.write_text(PLAN.replace("trials = 2", "trials = 3"))
    assert len(compare(file, more)) == 12


def test_compare_works_from_the_command_line(folder: Path, compared: Path) -> None:
    arguments = ["compare", str(folder / "plan.toml"), str(compared)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    assert "Which start is best" in done.stdout
    assert "What classification adds" in done.stdout
    assert (compared / "figures" / "balls.png").exists()
    assert CliRunner().invoke(main, [*arguments, "--table"]).stdout == done.stdout


# Trials that diverge


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


DIVERGING = PLAN.replace(
    "[starts.faster]\nlearning_rate = 0.01", "[starts.faster]\nlearning_rate = 1e30"
)


@pytest.fixture(scope="module")
def diverged(folder: Path) -> Path:
    (folder / "diverging.toml").write_text(DIVERGING)
    compare(folder / "diverging.toml", folder / "diverged")
    return folder / "diverged"


def test_a_trial_that_diverges_has_a_result_and_does_not_stop_the_others(diverged: Path) -> None:
    results = read_results(diverged)
    assert len(results) == 8
    failed = [result["start"] for result in results if result["failed"]]
    assert failed == ["faster"] * 4
    assert all("training diverged" in r["failed"] for r in results if r["failed"])
    assert not list(diverged.rglob("last.pt"))


def test_a_failed_trial_is_not_run_again_until_its_line_is_deleted(
    folder: Path, diverged: Path
) -> None:
    out = folder / "again"
    shutil.copytree(diverged, out)
    before = (out / "results.jsonl").read_text()
    compare(folder / "diverging.toml", out)
    assert (out / "results.jsonl").read_text() == before
    kept = [line for line in before.splitlines(keepends=True) if '"failed": null' in line]
    (out / "results.jsonl").write_text("".join(kept))
    compare(folder / "diverging.toml", out)
    assert read_results(out) == read_results(diverged), "from its beginning"


def test_the_command_line_reports_failed_trials(folder: Path, diverged: Path) -> None:
    done = CliRunner().invoke(main, ["compare", str(folder / "diverging.toml"), str(diverged)])
    assert done.exit_code == 0, done.stderr
    assert "8 trials in" in done.stdout
    assert "4 of them failed" in done.stdout
    assert "2 failed" in done.stdout, "in the table, where two folds make a trial"
    assert "First failure: balls, faster: loss is" in done.stderr


def test_other_errors_than_divergence_stop_the_comparison(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(running, "finetune", full)
    with pytest.raises(OSError, match="No space left"):
        compare(folder / "plan.toml", folder / "full")
    assert read_results(folder / "full") == []


def test_the_device_of_the_plan_is_used_unless_another_is_given(compared: Path) -> None:
    configs = [json.loads(file.read_text()) for file in (compared / "trials").rglob("config.json")]
    assert {config["config"]["device"] for config in configs} == {"cpu"}


def test_text_in_the_csv_table_is_not_a_formula_for_spreadsheets(tmp_path: Path) -> None:
    results = [{**result, "start": "-" + result["start"]} for result in RESULTS]
    write_tables(results, tmp_path)
    with (tmp_path / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["start"] for row in rows] == ["'-scratch", "'-restoration", "'-joint"]
    assert all(float(row["mean"]) > 0 for row in rows)


# Other folders


def test_a_folder_with_other_files_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(TrainError, match="neither a comparison nor empty"):
        compare(folder / "plan.toml", tmp_path)

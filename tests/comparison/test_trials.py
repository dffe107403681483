"""Running a comparison: results, resuming, several processes, and trials that diverge."""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from selenium import webdriver

from cli import main
from tests.support.browser import Page
from tests.support.command import running_semgen, start_server
from tests.support.comparison import PLAN
from tests.support.progress import CountedProgress
from trainer import TrainError
from trainer.comparison import compare, read_results, trials
from trainer.comparison.plan import list_trials, read_plan
from trainer.comparison.statistics import summarise
from trainer.comparison.trials import _record_settings
from trainer.report import write_run_report


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


def test_the_page_has_bars_and_the_tables(
    compared: Path, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    result = CliRunner().invoke(main, ["report", str(compared), str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    opened = Page(browser, (tmp_path / "page.html").as_uri())
    opened.go("")
    assert len(opened.all(".bar")) == 2, "a bar for each starting point"
    assert len(opened.all("circle.dot")) == 2 * 2 + 1, "trials, and the difference to the best"
    assert len(opened.all(".chart polyline")) == 2, "a curve for each starting point"
    tables = opened.one("#tables").text
    for row in summarise(read_results(compared)):
        assert f"{100 * row.mean:.2f} ± {100 * row.std:.2f} (2)" in tables
    assert "What classification adds (Result I)" in tables
    assert str(compared) not in (tmp_path / "page.html").read_text()
    assert browser.get_log("browser") == []


def test_a_comparison_has_a_page_of_its_own(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="give its folder alone"):
        write_run_report([compared, compared], tmp_path / "page.html")


def test_trials_that_are_done_are_not_run_again(folder: Path, compared: Path) -> None:
    before = (compared / "results.jsonl").read_bytes()
    compare(folder / "plan.toml", compared)
    assert (compared / "results.jsonl").read_bytes() == before


@contextlib.contextmanager
def running_command(
    folder: Path, out: Path, *options: str, plan: str = "plan.toml", errors: Path | None = None
) -> Iterator[ForkServerProcess]:
    """The command in another process, after its first trial is done."""
    command = ["compare", folder / plan, out, *options]
    with running_semgen(*command, errors=errors) as process:
        until = time.monotonic() + 120
        while not read_results(out) and time.monotonic() < until:
            time.sleep(0.02)
        yield process


def find_workers(process: ForkServerProcess) -> list[psutil.Process]:
    """Its processes: forked, as itself, from the server that has imported everything."""
    server = psutil.Process(process.pid).parent()
    assert server is not None
    return [child for child in server.children() if child.pid != process.pid]


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


def test_several_processes_share_the_work(
    folder: Path, compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_server()
    forks = multiprocessing.get_context("forkserver")  # new interpreters take ten seconds
    monkeypatch.setattr("multiprocessing.get_context", lambda _: forks)
    progress = CountedProgress()
    results = compare(
        folder / "plan.toml",
        folder / "shared",
        devices=("cpu", "cpu"),
        progress=progress,
    )
    assert progress.totals == progress.units == {"compare": 8}
    lines = (folder / "shared" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 8, "no trial was done twice"
    for one, other in zip(results, read_results(compared), strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=0.02)  # threads differ


def test_a_process_that_dies_is_reported(folder: Path, tmp_path: Path) -> None:
    """As when memory runs out; the others do not wait for it."""
    errors, two = tmp_path / "errors", ("--devices", "cpu,cpu")
    errors.touch()
    with running_command(folder, folder / "died", *two, errors=errors) as process:
        find_workers(process)[0].kill()
        process.join(60)
    assert process.exitcode == 1
    assert "a process died" in errors.read_text()


def test_worker_processes_end_when_their_parent_is_killed(folder: Path) -> None:
    with running_command(folder, folder / "orphaned", "--devices", "cpu,cpu") as process:
        workers = find_workers(process)
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
    assert len(workers) == 2
    assert not alive


def test_ctrl_c_ends_several_processes_in_one_line(folder: Path, tmp_path: Path) -> None:
    errors, out = tmp_path / "errors", folder / "interrupted"
    errors.touch()
    (folder / "long.toml").write_text(PLAN.replace("trials = 2", "trials = 100"))
    two = ("--devices", "cpu,cpu")
    with running_command(folder, out, *two, plan="long.toml", errors=errors) as process:
        workers = find_workers(process)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        _, alive = psutil.wait_procs(workers, timeout=20)
    assert process.exitcode == 1
    assert "Traceback" not in errors.read_text()
    assert errors.read_text().splitlines()[-1].startswith("Error: interrupted; run the same")
    assert len(workers) == 2
    assert not alive
    assert 0 < len(read_results(out)) < 400


def test_settings_that_another_process_changed_meanwhile_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = folder / "meanwhile.toml"
    changed.write_text(PLAN.replace("learning_rate = 0.01", "learning_rate = 0.02"))
    run_trial = trials._run_trial

    def run_and_change(*arguments: Any) -> None:
        run_trial(*arguments)
        planned = read_plan(changed)
        _record_settings(planned, list_trials(planned), tmp_path)

    monkeypatch.setattr(trials, "_run_trial", run_and_change)
    with pytest.raises(TrainError, match=r"faster: learning_rate: 0\.02 -> 0\.01"):
        compare(folder / "plan.toml", tmp_path)
    assert {result["start"] for result in read_results(tmp_path)} == {"scratch"}


def test_progress_does_not_count_trials_of_an_earlier_call(folder: Path, compared: Path) -> None:
    partly = folder / "partly"
    shutil.copytree(compared, partly)
    lines = (partly / "results.jsonl").read_text().splitlines(keepends=True)
    (partly / "results.jsonl").write_text("".join(lines[:6]))
    progress = CountedProgress()
    compare(folder / "plan.toml", partly, progress=progress)
    assert (progress.totals, progress.done) == ({"compare": 8}, {"compare": 6})
    assert progress.units == {"compare": 2}


def test_other_settings_need_another_folder(folder: Path, compared: Path) -> None:
    file = folder / "other.toml"
    file.write_text(PLAN.replace("learning_rate = 0.01", "learning_rate = 0.02"))
    with pytest.raises(TrainError, match=r"learning_rate: 0\.01 -> 0\.02"):
        compare(file, compared)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 3", "steps = 4", "steps: 3 -> 4"),
        ("folds = 2", 'folds = 2\nmetric = "iou"', "metric: dice -> iou"),
        ('path = "balls.csv"', 'path = "fewer.csv"', r"cases: 6 cases, \w+ -> 5 cases, \w+"),
    ],
)
def test_other_steps_cases_and_metrics_need_another_folder(
    folder: Path, compared: Path, old: str, new: str, message: str
) -> None:
    lines = (folder / "balls.csv").read_text().splitlines(keepends=True)
    (folder / "fewer.csv").write_text("".join(lines[:-1]))
    file = folder / "changed.toml"
    file.write_text(PLAN.replace(old, new))
    with pytest.raises(TrainError, match=message):
        compare(file, compared)


def test_settings_may_change_before_a_trial_has_begun(folder: Path, tmp_path: Path) -> None:
    file, out = folder / "wrong.toml", tmp_path / "out"
    file.write_text(PLAN.replace("steps = 3", "steps = 1"))
    planned = read_plan(file)
    out.mkdir()
    _record_settings(planned, list_trials(planned), out)
    file.write_text(PLAN)
    planned = read_plan(file)
    _record_settings(planned, list_trials(planned), out)
    begun = list_trials(planned)[0]
    (out / begun.folder).mkdir(parents=True)
    file.write_text(PLAN.replace("steps = 3", "steps = 1"))
    planned = read_plan(file)
    with pytest.raises(TrainError, match="steps: 3 -> 1"):
        _record_settings(planned, list_trials(planned), out)


@pytest.mark.parametrize("line", ["[1]", "{}", '{"task": "balls"}'])
def test_a_line_that_is_no_result_and_a_broken_plan_are_named(
    folder: Path, compared: Path, tmp_path: Path, line: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    with (out / "results.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(TrainError, match=r"results\.jsonl: line 9 is not the result of a trial"):
        read_results(str(out))
    (out / "plan.json").write_text("{")
    with pytest.raises(TrainError, match=r"plan\.json: is broken"):
        compare(folder / "plan.toml", out)


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
    assert "Which starting point is best" in done.stdout
    assert "What classification adds" in done.stdout
    assert (compared / "figures" / "balls.png").exists()
    assert CliRunner().invoke(main, [*arguments, "--table"]).stdout == done.stdout


# Trials that diverge

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

    monkeypatch.setattr(trials, "finetune", full)
    with pytest.raises(OSError, match="No space left"):
        compare(folder / "plan.toml", folder / "full")
    assert read_results(folder / "full") == []


def test_the_device_of_the_plan_is_used_unless_another_is_given(compared: Path) -> None:
    configs = [json.loads(file.read_text()) for file in (compared / "trials").rglob("config.json")]
    assert {config["config"]["device"] for config in configs} == {"cpu"}


# Other folders


def test_a_folder_with_other_files_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(TrainError, match="neither a comparison nor empty"):
        compare(folder / "plan.toml", tmp_path)

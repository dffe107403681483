"""Run a comparison: fine-tune every starting point on every task, several times.

Each trial has its own seed and folder, and gets a line in results.jsonl when it is done; one whose
training diverges gets a line with the reason instead of scores. Several processes, on one or more
devices and on other machines with the same disk, may work on one comparison: a trial's folder is
locked while it is trained, and trials that are done are skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from store.atomic import replace_file
from store.errors import check_local
from store.interrupts import interrupts_delayed
from store.progress import SILENT, Progress
from store.settings import differences, require, to_json
from trainer.checkpoint import BEST, LAST
from trainer.comparison.plan import Plan, Trial, list_trials, read_plan
from trainer.comparison.results import append_result, read_done, read_results
from trainer.config import MACHINE_SETTINGS, find_differences
from trainer.errors import Diverged, SettingError, TrainError
from trainer.finetuning.evaluation import MASKS, RESULT
from trainer.finetuning.session import finetune
from trainer.folder import BusyError, hold
from trainer.record import METRICS, TENSORBOARD

_POLL_SECONDS = 2.0
_SETTINGS = "plan.json"


def compare(
    plan: str | Path,
    out: str | Path,
    *,
    devices: Sequence[str] = ("auto",),
    force: bool = False,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Run every trial of a plan that is not done yet; returns the results of all.

    plan
        A TOML file with tasks and starting points (see `trainer.comparison.plan.PlanFile`).
    out
        Folder of the comparison: results.jsonl, plan.json, cases/, trials/. Created when missing.
    devices
        PyTorch devices, with one process each; a device may be given several times. "auto" is the
        plan's device, or a GPU if there is one.
    force
        Test also on scans that the weights were pretrained on; see `finetune`.

    A trial that diverges does not stop the others: its line in results.jsonl gives the reason, and
    it is run again if that line is deleted.

    Raises TrainError where the plan is wrong or `out` belongs to another one, and the errors of
    `finetune`.
    """
    check_local(out)
    require(bool(devices), "devices", "one or several", devices, error=SettingError)
    planned = read_plan(Path(plan))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    trials = list_trials(planned)
    _record_settings(planned, trials, out)
    done = _count_done(trials, out)
    with progress.stage("compare", len(trials), "trials", done=done) as advance:
        for now_done in _run_all(planned, trials, out, devices, force):
            advance(now_done - done)
            done = now_done
    return read_results(out)


def _run_all(
    plan: Plan, trials: list[Trial], out: Path, devices: Sequence[str], force: bool
) -> Iterator[int]:
    """Run the trials; yields now and then how many are done."""
    if len(devices) == 1:
        for _ in _work(plan, trials, out, devices[0], force):
            yield _count_done(trials, out)
        return
    threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(devices), context, end_with_parent) as pool:
        others = set(multiprocessing.active_children())
        try:
            with interrupts_delayed():
                workers = [
                    pool.submit(_work_in_process, plan, trials, out, device, force, threads)
                    for device in devices
                ]
            running = set(workers)
            while running:
                _, running = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                yield _count_done(trials, out)
        except BaseException:  # Ctrl-C
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # a training writes a checkpoint first
            raise
    for worker in workers:
        try:
            worker.result()
        except BrokenProcessPool as error:
            raise TrainError(
                f"{out}: a process died, most likely because memory ran out; run again with fewer"
                ' --devices. A script must call compare below `if __name__ == "__main__":`'
            ) from error


def _record_settings(plan: Plan, trials: Sequence[Trial], out: Path) -> None:
    """Record task and settings of each trial.

    Raises TrainError where they differ from those recorded of a trial that has begun.
    """
    file = out / _SETTINGS
    before: dict[str, dict[str, Any]] = {}
    if file.exists():
        before = _read_settings(out)
        done = read_done(out)
        for trial in trials:
            if trial.key in done or (out / trial.folder).exists():
                _refuse_other_settings(plan, trial, out, before)
    elif any(not path.name.startswith(".") for path in out.iterdir()):
        raise TrainError(f"{out}: is neither a comparison nor empty; give another OUT")
    now = {
        json.dumps(trial.key): plan.describe_task(trial.task) | to_json(trial.config)
        for trial in trials
    }
    with replace_file(file, shared=True) as partial:
        partial.write_text(json.dumps(before | now))


def _read_settings(out: Path) -> dict[str, dict[str, Any]]:
    """Task and settings as recorded, by the key of the trial (as JSON)."""
    file = out / _SETTINGS
    try:
        settings: dict[str, dict[str, Any]] = json.loads(file.read_text())
    except ValueError as error:
        raise TrainError(f"{file}: is broken; restore it, or give another OUT") from error
    return settings


def _refuse_other_settings(
    plan: Plan, trial: Trial, out: Path, recorded: dict[str, dict[str, Any]]
) -> None:
    """Raise TrainError where a trial was recorded with another task or other settings."""
    known = recorded.get(json.dumps(trial.key))
    if known is None:
        return
    task = plan.describe_task(trial.task)
    changed = differences(task, {name: known.get(name, task[name]) for name in task})
    changed += find_differences(known, trial.config, MACHINE_SETTINGS)
    if changed:
        raise TrainError(
            f"{out}: was made with other settings ({trial.task}, {trial.start}:"
            f" {'; '.join(changed)}); give the same ones or another OUT"
        )


def _count_done(trials: Sequence[Trial], out: Path) -> int:
    done = read_done(out)
    return sum(trial.key in done for trial in trials)


# Processes ---------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """Start a thread that ends this process when its parent ends, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work_in_process(
    plan: Plan, trials: list[Trial], out: Path, device: str, force: bool, threads: int
) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # dying would make the pool kill all
    torch.set_num_threads(threads)
    for _ in _work(plan, trials, out, device, force):
        pass


def _work(plan: Plan, trials: list[Trial], out: Path, device: str, force: bool) -> Iterator[Trial]:
    """Run the trials that are neither done nor running elsewhere; yields each when it is done."""
    before = read_done(out)
    for trial in trials:
        if trial.key in before:
            continue
        run = out / trial.folder
        run.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(BusyError), hold(run.with_name(f".{run.name}.lock"), run):
            if trial.key not in read_done(out):  # another process may have done it meanwhile
                _refuse_other_settings(plan, trial, out, _read_settings(out))  # or changed them
                _run_trial(plan, trial, out, device, force)
                yield trial


# One trial ---------------------------------------------------------------------------------------


def _run_trial(plan: Plan, trial: Trial, out: Path, device: str, force: bool) -> None:
    """Fine-tune and test, append the result, and delete what is not kept."""
    task, start = plan.tasks[trial.task], plan.starts[trial.start]
    run = out / trial.folder
    config = trial.config
    if device != "auto":
        config = dataclasses.replace(config, device=device)
    result = {
        **trial.key._asdict(),
        "order": list(plan.starts).index(trial.start),
        "adds_to": start.adds_to,
        "metric": task.metric,
    }
    try:
        finetune(task.path, run, config, cases_path=out / "cases" / trial.task, force=force)
        result |= _read_run(run, task.metric)
    except Diverged as error:
        reason, _, _ = str(error).partition(";")  # the advice after it is for a single run
        result |= {"score": None, "failed": reason, "seed": config.seed, "leaked": [], "curve": []}
    append_result(out, result)
    if not plan.keep_weights or result["failed"]:  # a failed trial begins anew if it is run again
        for name in (BEST, LAST):
            (run / name).unlink(missing_ok=True)
    if not plan.keep_weights:
        for name in (TENSORBOARD, MASKS):
            if name != MASKS or trial.trial:  # the masks of the first trial are kept to look at
                shutil.rmtree(run / name, ignore_errors=True)


def _read_run(run: Path, metric: str | None) -> dict[str, Any]:
    """The scores and facts of a run that is done."""
    result = json.loads((run / RESULT).read_text())
    return {
        "score": result["scores"].get(metric),
        "failed": None,
        **{name: result[name] for name in
           ("seed", "scores", "num_test", "steps", "best_step", "leaked", "fingerprint")},
        "curve": list(_read_curve(run / METRICS, metric)),
    }  # fmt: skip


def _read_curve(file: Path, metric: str | None) -> Iterator[tuple[int, float]]:
    """Step and validation score."""
    for text in file.read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "validation" and metric in line:
            yield line["step"], line[metric]

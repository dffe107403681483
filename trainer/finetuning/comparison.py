"""Tasks x starting points x trials: which start helps which task, and by how much.

A trial is a fine-tuning of its own seed, in a folder of its own, and one line of results.jsonl
when it is done. Any number of processes, also of other machines with the same disk, may work on
one comparison: a trial's folder is held by whoever trains there, and what is done is skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import BEST, LAST
from trainer.config import find_differences
from trainer.errors import TrainError
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.session import finetune
from trainer.finetuning.task import load_task
from trainer.finetuning.testing import MASKS, RESULT
from trainer.folder import BusyError, hold
from trainer.record import METRICS, TENSORBOARD

RESULTS = "results.jsonl"
_TELL_SECONDS = 2.0
_METRICS = {True: "dice", False: "auc"}
_KEY = ("task", "start", "label_fraction", "trial", "fold")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTask:
    """A task of a plan."""

    path: Path
    metric: str
    """Of the test cases: "dice" or "iou", "auc" or "accuracy"."""
    settings: dict[str, Any]
    """Of `FinetuneConfig`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStart:
    """A starting point of a plan."""

    init: str
    adds_to: str | None
    """The start that this one is, with classification added (Result I)."""
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is compared."""

    tasks: dict[str, PlannedTask]
    starts: dict[str, PlannedStart]
    trials: int
    label_fractions: tuple[float, ...]
    keep_weights: bool
    """Whether trials keep their weights: hundreds of MB each at full width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One fine-tuning of a comparison."""

    task: str
    start: str
    label_fraction: float
    trial: int
    """From 0; also added to the plan's seed."""
    fold: int
    config: FinetuneConfig

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _KEY)

    @property
    def folder(self) -> Path:
        """Within the comparison's."""
        share = f"{self.label_fraction:g}"
        return Path("trials") / self.task / self.start / share / f"{self.trial}-{self.fold}"


def read_plan(file: Path) -> Plan:
    """Read a plan; TrainError says what is wrong with it, and where.

    Paths in it are relative to its folder.
    """
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise TrainError(f"{file}: no such plan") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainError(f"{file}: cannot be read as TOML ({error})") from error
    plain = {"trials", "label_fractions", "keep_weights", "defaults", "tasks", "starts"}
    strange = sorted(content.keys() - plain)
    if strange or not content.get("tasks") or not content.get("starts"):
        raise TrainError(
            f"{file}: needs [tasks.NAME] and [starts.NAME], and may have"
            f" {', '.join(sorted(plain - {'tasks', 'starts'}))}; got {', '.join(strange) or 'less'}"
        )
    defaults = content.get("defaults", {})
    tasks, starts = {}, {}
    for name, given in content["tasks"].items():
        settings = {**defaults, **given}
        path = file.parent / str(settings.pop("path", ""))
        metric = settings.pop("metric", None)
        allowed = ("dice", "iou", "auc", "accuracy")
        if metric is None:
            metric = _METRICS[load_task(path).segments]
        if metric not in allowed:
            raise TrainError(f"{file}: task {name}: metric must be one of {', '.join(allowed)}")
        tasks[name] = PlannedTask(path=path, metric=metric, settings=settings)
    for name, given in content["starts"].items():
        settings = dict(given)
        adds_to = settings.pop("adds_to", None)
        if adds_to is not None and adds_to not in content["starts"]:
            raise TrainError(f"{file}: start {name}: adds_to {adds_to!r} is no start of this plan")
        init = _place(str(settings.pop("init", "scratch")), file.parent)
        starts[name] = PlannedStart(init=init, adds_to=adds_to, settings=settings)
    for name in (*tasks, *starts):
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise TrainError(f"{file}: {name!r} must be a plain name, for it names a folder")
    plan = Plan(
        tasks=tasks,
        starts=starts,
        trials=int(content.get("trials", 3)),
        label_fractions=tuple(content.get("label_fractions", (1.0,))),
        keep_weights=bool(content.get("keep_weights", False)),
    )
    list_trials(plan, file)  # whose settings are checked here
    return plan


def _place(init: str, folder: Path) -> str:
    """A start with its file relative to the plan's folder."""
    kind, colon, rest = init.rpartition(":")
    return init if init == "scratch" else f"{kind}{colon}{folder / rest}"


def list_trials(plan: Plan, file: Path) -> list[Trial]:
    """Every trial, first trials of all starts first, so that a table grows evenly."""
    trials = []
    for number, fraction, (task, planned), (start, begun) in itertools.product(
        range(plan.trials), plan.label_fractions, plan.tasks.items(), plan.starts.items()
    ):
        settings = {**planned.settings, **begun.settings}
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        share = settings.get("label_fraction", 1.0) * fraction
        settings |= {"init": begun.init, "label_fraction": share}
        settings["seed"] = settings.get("seed", 0) + number
        for fold in range(settings.get("folds") or 1):
            try:
                config = FinetuneConfig(**{**settings, "fold": fold})
            except (TypeError, TrainError) as error:
                raise TrainError(f"{file}: task {task}, start {start}: {error}") from error
            trials.append(
                Trial(
                    task=task,
                    start=start,
                    label_fraction=fraction,
                    trial=number,
                    fold=fold,
                    config=config,
                )
            )
    return trials


def read_results(out: Path) -> list[dict[str, Any]]:
    """The trials that are done, by task, share of labels, and starts as planned."""
    file = out / RESULTS
    if not file.exists():
        return []
    found = {}
    for line in file.read_text("utf-8").splitlines():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line of a process that was killed: that trial is done again
        found[tuple(result[name] for name in _KEY)] = result
    order = ("task", "label_fraction", "order", "trial", "fold")
    return sorted(found.values(), key=lambda result: [result[name] for name in order])


def compare(
    plan_path: str | Path,
    out_path: str | Path,
    *,
    devices: Sequence[str] = ("auto",),
    force: bool = False,
    on_trial: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Run every trial of a plan that is not done, one process a device; returns all results.

    devices
        Torch devices, each of which gets a process; the same one may stand there several times.
    force
        See `finetune`.

    Raises TrainError when the plan makes no sense, or what a trial raised.
    """
    plan_file, out = Path(plan_path), Path(out_path)
    plan = read_plan(plan_file)
    out.mkdir(parents=True, exist_ok=True)
    trials = list_trials(plan, plan_file)
    _hold_plan(trials, out)
    on_trial(_count_done(trials, out), len(trials))
    if len(devices) == 1:
        for _ in _work(plan, trials, out, devices[0], force):
            on_trial(_count_done(trials, out), len(trials))
        return read_results(out)
    threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(devices), context, _end_with_parent) as pool:
        workers = [
            pool.submit(_work_apart, plan, trials, out, device, force, threads)
            for device in devices
        ]
        running = set(workers)
        while running:
            _, running = wait(running, timeout=_TELL_SECONDS, return_when=FIRST_COMPLETED)
            on_trial(_count_done(trials, out), len(trials))
    for worker in workers:
        try:
            worker.result()
        except BrokenProcessPool as error:
            raise TrainError(
                f"{out}: a process died, most likely for lack of memory; run again with fewer"
                " --devices"
            ) from error
    return read_results(out)


def _hold_plan(trials: Sequence[Trial], out: Path) -> None:
    """Note what is compared here; TrainError when it was something else."""
    note = out / "plan.json"
    before: dict[str, dict[str, Any]] = {}  # settings by key, as JSON
    if note.exists():
        before = json.loads(note.read_text())
        for trial in trials:
            was = before.get(json.dumps(trial.key))
            changed = find_differences(was, trial.config) if was else []
            if changed:
                raise TrainError(
                    f"{out}: compared with other settings before ({trial.task}, {trial.start}:"
                    f" {'; '.join(changed)}); give the same ones or another OUT"
                )
    elif any(out.iterdir()):
        raise TrainError(f"{out}: no comparison, and not empty; give another OUT")
    partial = note.with_name(f"{note.name}.{os.getpid()}.partial")
    now = {json.dumps(trial.key): trial.config.to_dict() for trial in trials}
    partial.write_text(json.dumps(before | now))
    partial.replace(note)


def _done(out: Path) -> set[tuple[Any, ...]]:
    """Keys of the trials that are done."""
    return {tuple(result[name] for name in _KEY) for result in read_results(out)}


def _count_done(trials: Sequence[Trial], out: Path) -> int:
    done = _done(out)
    return sum(trial.key in done for trial in trials)


def _end_with_parent() -> None:
    """In a process of its own: end as soon as the one that made it does, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work_apart(
    plan: Plan, trials: list[Trial], out: Path, device: str, force: bool, threads: int
) -> None:
    """In a process of its own: work with a share of the threads."""
    torch.set_num_threads(threads)
    for _ in _work(plan, trials, out, device, force):
        pass


def _work(plan: Plan, trials: list[Trial], out: Path, device: str, force: bool) -> Iterator[Trial]:
    """Run trials that nobody did or does; yields each when it is done."""
    before = _done(out)
    for trial in trials:
        if trial.key in before:
            continue
        run = out / trial.folder
        run.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(BusyError), hold(run.with_name(f".{run.name}.lock"), run):
            if trial.key not in _done(out):  # another process may have been at it meanwhile
                _run(plan, trial, out, device, force)
                yield trial


def _run(plan: Plan, trial: Trial, out: Path, device: str, force: bool) -> None:
    planned, start = plan.tasks[trial.task], plan.starts[trial.start]
    run = out / trial.folder
    finetune(
        planned.path,
        run,
        dataclasses.replace(trial.config, device=device),
        cases_path=out / "cases" / trial.task,
        force=force,
    )
    result = json.loads((run / RESULT).read_text())
    line = {
        **dict(zip(_KEY, trial.key, strict=True)),
        "order": list(plan.starts).index(trial.start),
        "adds_to": start.adds_to,
        "metric": planned.metric,
        "score": result["scores"].get(planned.metric),
        **{name: result[name] for name in
           ("seed", "scores", "num_test", "steps", "best_step", "leaked", "fingerprint")},
        "curve": list(_read_curve(run / METRICS, planned.metric)),
    }  # fmt: skip
    _append(out / RESULTS, line)
    if not plan.keep_weights:
        for name in (BEST, LAST):
            (run / name).unlink(missing_ok=True)
        for name in (TENSORBOARD, MASKS):
            if name != MASKS or trial.trial:  # the first trial's masks are there to look at
                shutil.rmtree(run / name, ignore_errors=True)


def _append(file: Path, line: dict[str, Any]) -> None:
    """Add a line, after ending one that a killed process left half written."""
    with file.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        end = b"" if stream.read(1) in {b"", b"\n"} else b"\n"
        stream.write(end + json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _read_curve(file: Path, metric: str) -> Iterator[tuple[int, float]]:
    """Step and validation metric."""
    for text in file.read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "validation" and metric in line:
            yield line["step"], line[metric]

"""Tasks x starting points x trials: which start helps which task, and by how much.

A trial is a fine-tuning of its own seed, in a folder of its own, and one line of results.jsonl
when it is done. A trial that diverges is a line, too, with the reason instead of scores. Any number
of processes, also of other machines with the same disk, may work on one comparison: a trial's
folder is held by whoever trains there, and what is done is skipped.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from store.settings import build, check_types, read_toml, to_json
from trainer.checkpoint import BEST, LAST
from trainer.config import find_differences
from trainer.errors import Diverged, TrainError
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.evaluation import MASKS, RESULT
from trainer.finetuning.loading import fit_task, load_task
from trainer.finetuning.session import finetune
from trainer.finetuning.task import Task
from trainer.folder import BusyError, hold
from trainer.record import METRICS, TENSORBOARD

RESULTS = "results.jsonl"
_TELL_SECONDS = 2.0
_METRICS = {True: ("dice", "iou"), False: ("auc", "accuracy")}
"""Of a task that segments, and of one that classifies."""
T = TypeVar("T")
_KEY = ("task", "start", "label_fraction", "trial", "fold")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTask:
    """A table [tasks.NAME] of a plan, without its settings of `FinetuneConfig`."""

    path: str = ""
    """Folder or manifest; in a plan relative to it."""
    metric: str | None = None
    """Of the test cases: "dice" or "iou", "auc" or "accuracy"; None takes the first that fits."""

    def __post_init__(self) -> None:
        check_types(self, error=TrainError)
        if not self.path:
            raise TrainError("needs a path, to a folder or a manifest")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStart:
    """A table [starts.NAME] of a plan, without its settings of `FinetuneConfig`."""

    init: str = "scratch"
    """As in `FinetuneConfig`; in a plan a file is relative to it."""
    adds_to: str | None = None
    """The start that this one is, with classification added (Result I)."""

    def __post_init__(self) -> None:
        check_types(self, error=TrainError)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFile:
    """What a plan's file may hold, checked when made."""

    trials: int = 3
    """Times that each start is tried on each task, with a seed of its own."""
    label_fractions: tuple[float, ...] = (1.0,)
    """Shares of the training patients to use."""
    keep_weights: bool = False
    """Whether trials keep their weights: hundreds of MB each at full width."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings of `FinetuneConfig` for every trial."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """By name, a table of `PlannedTask` and settings for this task."""
    starts: dict[str, Any] = field(default_factory=dict)
    """By name, a table of `PlannedStart` and settings for this start."""

    def __post_init__(self) -> None:
        check_types(self, error=TrainError)
        shares = self.label_fractions
        if self.trials < 1:
            raise TrainError(f"trials must be >= 1, got {self.trials}")
        if not shares or not all(0 < share <= 1 for share in shares):
            raise TrainError(f"label_fractions must be in (0, 1], got {list(shares)}")
        if len({_share_folder(share) for share in shares}) < len(shares):
            raise TrainError(f"label_fractions must differ, got {list(shares)}")
        for kind, tables in (("tasks", self.tasks), ("starts", self.starts)):
            if not tables:
                raise TrainError(f"needs [tasks.NAME] and [starts.NAME]; has no {kind}")
            for name, table in tables.items():
                if not isinstance(table, dict):
                    raise TrainError(
                        f"{kind}.{name} must be a table [{kind}.{name}], got {table!r}"
                    )
                if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                    raise TrainError(f"{name!r} must be a plain name, for it names a folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is compared."""

    tasks: dict[str, PlannedTask]
    """With a metric each."""
    starts: dict[str, PlannedStart]
    configs: dict[tuple[str, str], FinetuneConfig]
    """By task and start; a trial changes seed, fold and share of labels."""
    trials: int
    label_fractions: tuple[float, ...]
    keep_weights: bool


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
        share = _share_folder(self.label_fraction)
        return Path("trials") / self.task / self.start / share / f"{self.trial}-{self.fold}"


def _share_folder(label_fraction: float) -> str:
    return f"{label_fraction:g}"


def read_plan(file: Path) -> Plan:
    """Read a plan; TrainError says what is wrong with it, and where.

    Paths in it are relative to its folder.
    """
    content = read_toml(file, error=TrainError)
    with _naming(str(file)):
        return _make_plan(build(PlanFile, content, error=TrainError), file.parent)


def _make_plan(given: PlanFile, folder: Path) -> Plan:
    tasks: dict[str, PlannedTask] = {}
    starts: dict[str, PlannedStart] = {}
    configs: dict[tuple[str, str], FinetuneConfig] = {}
    loaded: dict[str, Task] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, table in given.tasks.items():
        with _naming(f"task {name}"):
            planned, settings[name] = _take(PlannedTask, {**given.defaults, **table})
            path = folder / planned.path
            loaded[name] = load_task(path)
            metric = _choose_metric(planned.metric, loaded[name])
            tasks[name] = PlannedTask(path=str(path), metric=metric)
    for name, table in given.starts.items():
        with _naming(f"start {name}"):
            begun, own = _take(PlannedStart, table)
            if begun.adds_to is not None and begun.adds_to not in given.starts:
                raise TrainError(f"adds_to {begun.adds_to!r} is no start of this plan")
            starts[name] = dataclasses.replace(begun, init=_find_weights(begun.init, folder))
        for task, planned in tasks.items():
            with _naming(f"task {task}, start {name}"):
                config = _make_config({**settings[task], **own}, starts[name].init)
                _refuse_untestable(loaded[task], config, planned.metric)
                configs[task, name] = config
    return Plan(
        tasks=tasks,
        starts=starts,
        configs=configs,
        trials=given.trials,
        label_fractions=given.label_fractions,
        keep_weights=given.keep_weights,
    )


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Say where in the plan something is wrong."""
    try:
        yield
    except TrainError as error:
        raise TrainError(f"{where}: {error}") from error


def _take(kind: type[T], table: dict[str, Any]) -> tuple[T, dict[str, Any]]:
    """A plan's own part of a table, and the rest: settings of fine-tuning."""
    own = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    part = build(kind, {k: v for k, v in table.items() if k in own}, error=TrainError)
    return part, {k: v for k, v in table.items() if k not in own}


def _choose_metric(metric: str | None, task: Task) -> str:
    """The metric, or the first one, of those that the kind of task has."""
    allowed = _METRICS[task.segments]
    if metric is not None and metric not in allowed:
        kind = "segments" if task.segments else "classifies"
        raise TrainError(f"{kind}: metric must be one of {', '.join(allowed)}, got {metric!r}")
    return metric or allowed[0]


def _find_weights(init: str, folder: Path) -> str:
    """A start with its file relative to the plan's folder."""
    if init == "scratch":
        return init
    kind, colon, rest = init.rpartition(":")
    if not (folder / rest).exists():
        raise TrainError(f"init: {folder / rest}: no such file or run")
    return f"{kind}{colon}{folder / rest}"


def _make_config(settings: dict[str, Any], init: str) -> FinetuneConfig:
    for name, why in (("init", "it belongs in [starts.NAME]"), ("fold", "every fold is run")):
        if name in settings:
            raise TrainError(f"{name} cannot be set here: {why}")
    return build(FinetuneConfig, {**settings, "init": init}, error=TrainError)


def _refuse_untestable(task: Task, config: FinetuneConfig, metric: str | None) -> None:
    """Raise TrainError where the test cases give no score: else it shows after all training."""
    labels = 0
    for fold in range(config.folds or 1):
        dealt = fit_task(task, dataclasses.replace(config, fold=fold))
        labels = max(labels, len({case.label for case in dealt.cases if case.split == "test"}))
    if not labels:
        raise TrainError("no case is tested on; raise test_fraction, or give folds")
    if metric == "auc" and labels < 2:
        raise TrainError(
            'all test cases have one label, which leaves auc undefined; give metric = "accuracy",'
            " or test on more patients"
        )


def list_trials(plan: Plan) -> list[Trial]:
    """Every trial, first trials of all starts first, so that a table grows evenly."""
    return [
        Trial(
            task=task,
            start=start,
            label_fraction=fraction,
            trial=number,
            fold=fold,
            config=dataclasses.replace(
                config,
                label_fraction=config.label_fraction * fraction,
                seed=config.seed + number,
                fold=fold,
            ),
        )
        for number, fraction, task, start in itertools.product(
            range(plan.trials), plan.label_fractions, plan.tasks, plan.starts
        )
        for config in [plan.configs[task, start]]
        for fold in range(config.folds or 1)
    ]


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
        "auto" takes what the plan says, or a GPU where there is one.
    force
        See `finetune`.

    A trial that diverges fails alone: its line in results.jsonl says why, and deleting that line
    makes it be tried again.

    Raises TrainError when the plan makes no sense, or what a trial raised.
    """
    plan_file, out = Path(plan_path), Path(out_path)
    plan = read_plan(plan_file)
    out.mkdir(parents=True, exist_ok=True)
    trials = list_trials(plan)
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
    now = {json.dumps(trial.key): to_json(trial.config) for trial in trials}
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
    config = trial.config
    if device != "auto":
        config = dataclasses.replace(config, device=device)
    line = {
        **dict(zip(_KEY, trial.key, strict=True)),
        "order": list(plan.starts).index(trial.start),
        "adds_to": start.adds_to,
        "metric": planned.metric,
    }
    try:
        finetune(planned.path, run, config, cases_path=out / "cases" / trial.task, force=force)
        line |= _read_result(run, planned.metric)
    except Diverged as error:
        reason, _, _ = str(error).partition(";")  # what to do about it is said of single runs
        line |= {"score": None, "failed": reason, "seed": config.seed, "leaked": [], "curve": []}
    _append(out / RESULTS, line)
    if not plan.keep_weights or line["failed"]:  # tried again, a failed trial begins anew
        for name in (BEST, LAST):
            (run / name).unlink(missing_ok=True)
    if not plan.keep_weights:
        for name in (TENSORBOARD, MASKS):
            if name != MASKS or trial.trial:  # the first trial's masks are there to look at
                shutil.rmtree(run / name, ignore_errors=True)


def _read_result(run: Path, metric: str | None) -> dict[str, Any]:
    """What a trial that is done adds to its line."""
    result = json.loads((run / RESULT).read_text())
    return {
        "score": result["scores"].get(metric),
        "failed": None,
        **{name: result[name] for name in
           ("seed", "scores", "num_test", "steps", "best_step", "leaked", "fingerprint")},
        "curve": list(_read_curve(run / METRICS, metric)),
    }  # fmt: skip


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


def _read_curve(file: Path, metric: str | None) -> Iterator[tuple[int, float]]:
    """Step and validation metric."""
    for text in file.read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "validation" and metric in line:
            yield line["step"], line[metric]

"""The plan of a comparison: a TOML file of tasks, starting points, settings; its list of trials."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from store.settings import build, check_types, read_toml
from trainer.comparison.results import Key
from trainer.errors import SettingError, TrainError
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.loading import fit_task, load_task
from trainer.finetuning.task import Task

_METRICS = {True: ("dice", "iou"), False: ("auc", "accuracy")}
"""For segmentation (True) and for classification."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTask:
    """A table [tasks.NAME] of a plan, without its settings of `FinetuneConfig`."""

    path: str = ""
    """Folder or manifest of the task; in the file, relative to the plan's folder."""
    metric: str | None = None
    """Score to compare: "dice" or "iou" for masks, "auc" or "accuracy" for labels. Default: the
    first of the two."""

    def __post_init__(self) -> None:
        check_types(self, error=SettingError)
        if not self.path:
            raise SettingError("needs a path: give the folder or CSV manifest of the task")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStart:
    """A table [starts.NAME] of a plan, without its settings of `FinetuneConfig`."""

    init: str = "scratch"
    """As in `FinetuneConfig`; in the file, a path is relative to the plan's folder."""
    adds_to: str | None = None
    """Starting point to which this one adds the classification loss in pretraining (the paper's
    Result I)."""

    def __post_init__(self) -> None:
        check_types(self, error=SettingError)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFile:
    """The content of a plan's file."""

    trials: int = 3
    """Number of trials of each starting point on each task. Trial n uses the plan's seed + n."""
    label_fractions: tuple[float, ...] = (1.0,)
    """Shares of the training patients to use."""
    keep_weights: bool = False
    """Keep the weights of trials: hundreds of MB each at full width."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings of `FinetuneConfig` for every trial."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """By name, a table of `PlannedTask` and settings for this task."""
    starts: dict[str, Any] = field(default_factory=dict)
    """By name, a table of `PlannedStart` and settings for this starting point."""

    def __post_init__(self) -> None:
        check_types(self, error=SettingError)
        shares = self.label_fractions
        if self.trials < 1:
            raise SettingError(f"trials must be >= 1, got {self.trials}")
        if not shares or not all(0 < share <= 1 for share in shares):
            raise SettingError(f"label_fractions must be in (0, 1], got {list(shares)}")
        if len({_share_folder(share) for share in shares}) < len(shares):
            raise SettingError(f"label_fractions must differ, got {list(shares)}")
        for kind, tables in (("tasks", self.tasks), ("starts", self.starts)):
            if not tables:
                raise SettingError(f"has no {kind}; add at least one table [{kind}.NAME]")
            for name, table in tables.items():
                if not isinstance(table, dict):
                    raise SettingError(
                        f"{kind}.{name} must be a table [{kind}.{name}], got {table!r}"
                    )
                if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                    raise SettingError(
                        f"{name!r} must be a plain name, because a folder gets this name; use"
                        " letters, digits, - and _"
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A plan whose tasks and settings are checked."""

    tasks: dict[str, PlannedTask]
    """Each with its metric."""
    cases: dict[str, str]
    """By task, a digest of its classes and cases; not of where they lie."""
    starts: dict[str, PlannedStart]
    configs: dict[tuple[str, str], FinetuneConfig]
    """By task and starting point; a trial changes seed, fold and share of labels."""
    trials: int
    label_fractions: tuple[float, ...]
    keep_weights: bool

    def describe_task(self, name: str) -> dict[str, str | None]:
        """What must be the same in all trials of a task, besides the settings."""
        return {"cases": self.cases[name], "metric": self.tasks[name].metric}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One fine-tuning of a comparison."""

    task: str
    start: str
    label_fraction: float
    trial: int
    """From 0."""
    fold: int
    config: FinetuneConfig

    @property
    def key(self) -> Key:
        return Key(self.task, self.start, self.label_fraction, self.trial, self.fold)

    @property
    def folder(self) -> Path:
        """Relative to the comparison's folder."""
        share = _share_folder(self.label_fraction)
        return Path("trials") / self.task / self.start / share / f"{self.trial}-{self.fold}"


def _share_folder(label_fraction: float) -> str:
    return f"{label_fraction:g}"


def read_plan(file: Path) -> Plan:
    """Read a plan and check it, with its tasks; paths in it are relative to its folder.

    Raises TrainError saying what is wrong, and where in the file.
    """
    content = read_toml(file, error=SettingError)
    with _prefix_errors(str(file)):
        return _make_plan(build(PlanFile, content, error=SettingError), file.parent)


def list_trials(plan: Plan) -> list[Trial]:
    """All trials; the first of every starting point comes before the second of any."""
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


def _make_plan(given: PlanFile, folder: Path) -> Plan:
    tasks: dict[str, PlannedTask] = {}
    starts: dict[str, PlannedStart] = {}
    configs: dict[tuple[str, str], FinetuneConfig] = {}
    loaded: dict[str, Task] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, table in given.tasks.items():
        with _prefix_errors(f"task {name}"):
            planned, settings[name] = _split_table(PlannedTask, {**given.defaults, **table})
            path = folder / planned.path
            loaded[name] = load_task(path)
            metric = _choose_metric(planned.metric, loaded[name])
            tasks[name] = PlannedTask(path=str(path), metric=metric)
    for name, table in given.starts.items():
        with _prefix_errors(f"start {name}"):
            start, own = _split_table(PlannedStart, table)
            if start.adds_to is not None and start.adds_to not in given.starts:
                raise TrainError(
                    f"adds_to {start.adds_to!r} is not a starting point of this plan; give one of"
                    f" {', '.join(given.starts)}"
                )
            starts[name] = dataclasses.replace(start, init=_find_weights(start.init, folder))
        for task, planned in tasks.items():
            with _prefix_errors(f"task {task}, start {name}"):
                config = _make_config({**settings[task], **own}, starts[name].init)
                if config.seed + given.trials > 2**63:
                    raise TrainError(
                        f"seed + trials must be at most 2^63, got {config.seed} + {given.trials}"
                    )
                _check_testable(loaded[task], config, planned.metric)
                configs[task, name] = config
    return Plan(
        tasks=tasks,
        cases={name: _digest(task) for name, task in loaded.items()},
        starts=starts,
        configs=configs,
        trials=given.trials,
        label_fractions=given.label_fractions,
        keep_weights=given.keep_weights,
    )


def _digest(task: Task) -> str:
    cases = sorted((c.name, c.patient, str(c.split), c.label, c.centre_mm) for c in task.cases)
    content = json.dumps([task.classes, task.segments, cases])
    return f"{len(cases)} cases, {hashlib.sha256(content.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def _prefix_errors(where: str) -> Iterator[None]:
    """Begin the message of a TrainError with the part of the plan where it comes from."""
    try:
        yield
    except TrainError as error:
        raise type(error)(f"{where}: {error}") from error


def _split_table(kind: type[T], table: dict[str, Any]) -> tuple[T, dict[str, Any]]:
    """The fields of `kind` in a table, and the rest: settings of `FinetuneConfig`."""
    own = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    part = build(kind, {k: v for k, v in table.items() if k in own}, error=SettingError)
    return part, {k: v for k, v in table.items() if k not in own}


def _choose_metric(metric: str | None, task: Task) -> str:
    """The given metric, or the default one for the kind of task."""
    allowed = _METRICS[task.segments]
    if metric is not None and metric not in allowed:
        kind = "segmentation" if task.segments else "classification"
        raise SettingError(f"{kind}: metric must be one of {', '.join(allowed)}, got {metric!r}")
    return metric or allowed[0]


def _find_weights(init: str, folder: Path) -> str:
    """`init` with its path relative to the plan's folder."""
    if init == "scratch":
        return init
    kind, colon, rest = init.rpartition(":")
    if not (folder / rest).exists():
        raise TrainError(f"init: {folder / rest}: no such file or run")
    return f"{kind}{colon}{folder / rest}"


def _make_config(settings: dict[str, Any], init: str) -> FinetuneConfig:
    for name, why in (("init", "it belongs in [starts.NAME]"), ("fold", "every fold is run")):
        if name in settings:
            raise SettingError(f"{name} cannot be set here: {why}")
    return build(FinetuneConfig, {**settings, "init": init}, error=SettingError)


def _check_testable(task: Task, config: FinetuneConfig, metric: str | None) -> None:
    """Raise TrainError where the test cases give no score, before any training."""
    labels = 0
    for fold in range(config.folds or 1):
        fitted = fit_task(task, dataclasses.replace(config, fold=fold))
        labels = max(labels, len({case.label for case in fitted.cases if case.split == "test"}))
    if not labels:
        raise TrainError("there are no test cases; raise test_fraction, or give folds")
    if metric == "auc" and labels < 2:
        raise TrainError(
            'all test cases have the same label, so auc is undefined; give metric = "accuracy",'
            " or test on more patients"
        )

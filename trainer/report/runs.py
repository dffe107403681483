"""Collect a run for its page: settings, curves, restored crops, speed. No store is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from store.settings import to_json
from trainer.comparison.results import RESULTS
from trainer.config import MACHINE_SETTINGS, LoopConfig, TrainConfig
from trainer.errors import TrainError
from trainer.finetuning.config import FinetuneConfig

CONFIG, _METRICS, _TENSORBOARD = "config.json", "metrics.jsonl", "tensorboard"
_MOST_POINTS = 1000
"""Points of a curve on the page; a longer one is averaged."""
_RESOLVED: Final = frozenset(
    {"precision", "normalise", "warmup_epochs", "excluded_classes", "excluded_members"}
)
"""Settings that a run always resolves, so that they differ from their default."""
_LABEL_SETTINGS = 3
_TELLING: Final = frozenset(
    {"pretext", "classify", "net", "width", "init", "init_part", "fraction"}
)
"""Settings that tell runs apart best."""
_BASELINES: Final = frozenset({"identity", "visible_mean"})
_RESTORING: Final = ("restoration", "inpainting", "shuffling", "mae")
"""Losses of tasks that restore crops; a baseline belongs to the one that a run has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run's files, read."""

    folder: Path
    content: dict[str, Any]
    """Of config.json."""
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""

    @property
    def config(self) -> dict[str, Any]:
        """Settings by name, as JSON has them."""
        config: dict[str, Any] = self.content["config"]
        return config

    @property
    def fingerprint(self) -> str | None:
        """Of the store, or of the task."""
        found: str | None = self.content.get("store_fingerprint")
        return found or self.content.get("task_fingerprint")

    @property
    def is_finetuning(self) -> bool:
        return "task" in self.content


def is_run(path: Path) -> bool:
    """Whether a path is a run directory, or the folder of a comparison."""
    return (path / CONFIG).is_file() or (path / RESULTS).is_file()


def read_run(folder: Path) -> Run:
    """Read a run; TrainError where the folder holds none."""
    try:
        content = json.loads((folder / CONFIG).read_text())
        assert isinstance(content["config"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise TrainError(
            f"{folder}: not a run (no readable {CONFIG}); give the RUN folder of semgen pretrain or"
            " finetune, or the OUT folder of semgen compare"
        ) from None
    return Run(folder=folder, content=content, lines=list(_read_lines(folder / _METRICS)))


def describe_run(run: Run) -> dict[str, Any]:
    """What the page shows of a run, without pictures. Neither paths nor names of files."""
    config = run.config
    validations = [line for line in run.lines if line["kind"] == "validation"]
    last = run.lines[-1] if run.lines else {"step": 0, "epoch": 0}
    steps_per_epoch = next((v["step"] / v["epoch"] for v in validations if v["epoch"]), None)
    return {
        "finetuning": run.is_finetuning,
        "settings": list_settings(run),
        "facts": {
            "task": config.get("pretext") or _own(run, "own_pretext", "a task of one's own"),
            "classify": config.get("classify"),
            "net": _describe_net(run),
            "parameters": run.content.get("num_parameters"),
            "device": run.content.get("device"),
            "precision": config.get("precision"),
            "values": config.get("normalise"),
            "excluded": config.get("excluded_classes"),
            "excludedMembers": len(config.get("excluded_members") or ()),
            "steps": last["step"],
            "epochs": validations[-1]["epoch"] if validations else 0,
            "batch": config["batch_size"],
            "fingerprint": run.fingerprint,
            **_read_speed(run.folder / _TENSORBOARD),
        },
        "stepsPerEpoch": steps_per_epoch,
        "warmupSteps": (config.get("warmup_epochs") or 0) * (steps_per_epoch or 0),
        "best": _find_best(run, validations),
        "curves": _gather_curves(run.lines),
    }  # fmt: skip


def list_settings(run: Run) -> list[tuple[str, Any, Any]]:
    """Name, value and default of each setting that is not the default."""
    kind: type[LoopConfig] = FinetuneConfig if run.is_finetuning else TrainConfig
    defaults = to_json(kind())
    return [
        (name, _hide_path(name, value), defaults.get(name))
        for name, value in run.config.items()
        if value != defaults.get(name) and name not in _RESOLVED | MACHINE_SETTINGS
    ]


def label_runs(runs: list[Run]) -> list[str]:
    """What tells each run from the others: up to three settings that differ between them."""
    names = dict.fromkeys(name for run in runs for name, _, _ in list_settings(run))
    values = {name: [_hide_path(name, run.config.get(name)) for run in runs] for name in names}
    differing = [name for name, found in values.items() if any(v != found[0] for v in found)]
    differing.sort(key=lambda name: name not in _TELLING)
    return [
        ", ".join(f"{name.replace('_', ' ')} {_text(values[name][number])}"
                  for name in differing[:_LABEL_SETTINGS])
        for number in range(len(runs))
    ]  # fmt: skip


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "default" if value is None else "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _hide_path(name: str, value: Any) -> Any:
    """A setting as the page shows it: the kind of initial weights, not their file."""
    if name != "init" or value in (None, "scratch"):
        return value
    kind = str(value).partition(":")[0]
    return kind if kind in ("medicalnet", "i3d") else "weights of a file"


def _own(run: Run, fact: str, text: str) -> str | None:
    return text if fact in run.content else None


def _describe_net(run: Run) -> str | None:
    config = run.config
    if run.is_finetuning and config.get("init") != "scratch":
        return "as its initial weights"
    name = config.get("net") or _own(run, "own_net", "one's own")
    return f"{name}, width {config['width']}" if config.get("net") else name


def _find_best(run: Run, validations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The validation with the lowest loss, after the warm-up if it has ended."""
    warmup = run.config.get("warmup_epochs") or 0
    joint = [line for line in validations if line["epoch"] > warmup] or validations
    return min(joint, key=lambda line: line["loss"], default=None)


# Files


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics; the last one may be incomplete while a run is training."""
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            return


def _gather_curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    """By metric: points (step, value) by kind, "train", "validation" and "baseline"."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for line in lines:
        restoring = next((name for name in _RESTORING if name in line), None)
        for name, value in line.items():
            if name in ("kind", "step", "epoch"):
                continue
            is_baseline = name in _BASELINES and restoring is not None
            metric, kind = (restoring, "baseline") if is_baseline else (name, line["kind"])
            assert metric is not None
            curves.setdefault(metric, {}).setdefault(kind, []).append([line["step"], value])
    return {
        metric: {kind: _shorten(points) for kind, points in kinds.items()}
        for metric, kinds in curves.items()
    }


def _shorten(points: list[list[float]]) -> list[list[float]]:
    """At most `_MOST_POINTS` points: means of neighbours, at the step of the last of them."""
    values = np.asarray(points, np.float64)
    parts = np.array_split(values, min(len(values), _MOST_POINTS))
    return [[int(part[-1, 0]), float(f"{part[:, 1].mean():.5g}")] for part in parts]


def _read_speed(folder: Path) -> dict[str, float | None]:
    """Seconds of training, examples per second and share of waiting, from TensorBoard's events.

    Each process of a resumed run has a file of its own; the time between them does not count.
    """
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped] # noqa: PLC0415 - slow

    seconds, rates, waits = 0.0, [], []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        sizes = {"scalars": 0, "images": 1, "tensors": 1}
        board = event_accumulator.EventAccumulator(str(file), sizes)
        board.Reload()
        if "rate/examples_per_s" not in board.Tags()["scalars"]:
            continue
        speed = board.Scalars("rate/examples_per_s")
        seconds += speed[-1].wall_time - board.FirstEventTimestamp()
        rates += [point.value for point in speed]
        waits += [point.value for point in board.Scalars("rate/wait")]
    return {
        "seconds": round(seconds, 1) if rates else None,
        "perSecond": round(float(np.median(rates)), 1) if rates else None,
        "waiting": round(float(np.mean(waits)), 3) if waits else None,
    }

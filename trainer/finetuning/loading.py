"""Load a task and fit it to the settings: check them, choose the channel, assign the splits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trainer.errors import TrainError
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.manifest import read_manifest
from trainer.finetuning.nnunet import DATASET, channel_file, channel_intensity, read_folder
from trainer.finetuning.splits import assign_splits
from trainer.finetuning.task import Task, check_cases


def load_task(path: str | Path) -> Task:
    """Read a task from a folder (see `nnunet`) or a CSV file (see `manifest`).

    Raises TrainError saying what is missing or wrong, and where.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return read_manifest(path)
    raise TrainError(f"{path}: no such task; give a folder with {DATASET}, or a CSV manifest")


def fit_task(task: Task, config: FinetuneConfig) -> Task:
    """The task with one channel for each image and a split for each case (see `assign_splits`).

    Raises TrainError for settings that have no effect on this task.
    """
    task = _choose_channel(task, config.channel)
    if not task.segments:
        if "dice" in config.loss:
            raise TrainError(
                f"{task.name}: loss {config.loss!r} needs masks, but this task has labels; leave"
                " out the loss or give cross-entropy"
            )
        if config.spacing_mm is not None and not task.has_centres:
            raise TrainError(
                f"{task.name}: spacing has no effect, because each whole image is resized to the"
                " net's input; leave out the spacing"
            )
    return assign_splits(task, config)


def _choose_channel(task: Task, channel: int | None) -> Task:
    """The task with this channel of each image."""
    names = task.channels
    if channel is None:
        if names:
            known = ", ".join(f"{number} {name}" for number, name in enumerate(names))
            raise TrainError(
                f"{task.name}: images have {len(names)} channels ({known}) and the net takes one;"
                " give --channel"
            )
        return task
    if names and channel >= len(names):
        raise TrainError(f"{task.name}: channel must be below {len(names)}, got {channel}")
    cases = [
        dataclasses.replace(case, image=channel_file(case, channel), channel=channel)
        if case.channel is None
        else case
        for case in task.cases
    ]
    intensity = channel_intensity(names[channel]) if names else task.intensity
    task = dataclasses.replace(task, cases=tuple(cases), intensity=intensity, channels=())
    check_cases(task.name, task.cases)
    return task

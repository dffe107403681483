"""Run directory: creation, validation, locking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from store.atomic import locked, replace_file
from store.errors import is_utf8
from store.settings import to_json
from trainer.config import LoopConfig
from trainer.errors import TrainError

CONFIG = "config.json"
_LOCK = ".lock"


class BusyError(TrainError):
    """Another process is training in the run directory."""


@contextmanager
def open_run(run: Path, *, finetuning: bool = False) -> Iterator[None]:
    """Create the run directory and lock it against other processes.

    When the block fails before config.json is written, a new directory is deleted again. Raises
    TrainError when the path holds something else, also a run of the other kind; BusyError when
    another process has the lock.
    """
    existed = run.exists()
    _make_directory(run, finetuning=finetuning)
    with hold(run / _LOCK, run):
        try:
            yield
        finally:
            if not (run / CONFIG).exists():
                (run / _LOCK).unlink()
                if not existed and not any(run.iterdir()):
                    run.rmdir()


def _make_directory(run: Path, *, finetuning: bool) -> None:
    if run.exists() and not run.is_dir():
        raise TrainError(f"{run}: expected a folder for the run, got a file; give another RUN")
    if not is_utf8(run.absolute()):
        raise TrainError(f"{run}: the name of the folder must be UTF-8; give another RUN")
    run.mkdir(parents=True, exist_ok=True)
    others = [path for path in run.iterdir() if not path.name.startswith(".")]
    if others and not (run / CONFIG).exists():
        raise TrainError(
            f"{run}: not a run directory, and not empty ({others[0].name}); give another RUN"
        )
    try:
        content = json.loads((run / CONFIG).read_text())
    except (FileNotFoundError, ValueError):  # the checkpoint has all; config.json is written again
        return
    if ("task" in content) != finetuning:
        other = "pretrain" if finetuning else "finetune"
        raise TrainError(f"{run}: a run of `semgen {other}`; give another RUN")


def write_config(run: Path, config: LoopConfig, **facts: Any) -> None:
    """Write config.json: resolved settings, the given facts about the data, software versions."""
    content = {
        "config": to_json(config),
        **facts,
        "software": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    with replace_file(run / CONFIG) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def hold(lock: Path, run: Path) -> Iterator[None]:
    """Hold a lock file; raises BusyError that names `run` when another process holds it."""
    busy = BusyError(f"{run}: another process is training here; wait for it or give another RUN")
    with locked(lock, busy=busy):
        yield

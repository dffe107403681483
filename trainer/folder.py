"""Run directory: creation, validation, locking."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from store.settings import to_json
from trainer.config import LoopConfig
from trainer.errors import TrainError

CONFIG = "config.json"
_LOCK = ".lock"


class BusyError(TrainError):
    """Another process trains there."""


@contextmanager
def open_run(run: Path) -> Iterator[None]:
    """Make the run's folder and keep every other writer out of it.

    A run that fails before its config.json is written leaves no folder behind. Raises TrainError
    when something else is there, BusyError when another process writes there.
    """
    existed = run.exists()
    _make_folder(run)
    with hold(run / _LOCK, run):
        try:
            yield
        finally:
            if not (run / CONFIG).exists():
                (run / _LOCK).unlink()
                if not existed and not any(run.iterdir()):
                    run.rmdir()


def _make_folder(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise TrainError(f"{run}: expected a folder for the run, got a file; give another RUN")
    run.mkdir(parents=True, exist_ok=True)
    others = [path for path in run.iterdir() if not path.name.startswith(".")]
    if others and not (run / CONFIG).exists():
        raise TrainError(f"{run}: not a run, and not empty ({others[0].name}); give another RUN")


def write_config(run: Path, config: LoopConfig, **facts: Any) -> None:
    """The resolved settings, what was learned from, and the software, for people."""
    content = {
        "config": to_json(config),
        **facts,
        "software": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    partial = run / (CONFIG + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(run / CONFIG)


@contextmanager
def hold(lock: Path, run: Path) -> Iterator[None]:
    """Keep out all others that hold the same file; BusyError, about `run`, when there is one."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"{run}: another process is training here; wait for it or give another RUN"
            ) from error
        yield

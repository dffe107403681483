"""A run's folder: made once, told from other folders, written by one process at a time."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from trainer.config import LoopConfig
from trainer.errors import TrainError

CONFIG = "config.json"
_LOCK = ".lock"


class BusyError(TrainError):
    """Another process trains there."""


def make_folder(run: Path) -> None:
    """Make the run's folder; TrainError when something else is there."""
    if run.exists() and not run.is_dir():
        raise TrainError(f"{run}: expected a folder for the run, got a file; give another RUN")
    run.mkdir(parents=True, exist_ok=True)
    others = [path for path in run.iterdir() if not path.name.startswith(".")]
    if others and not (run / CONFIG).exists():
        raise TrainError(f"{run}: not a run, and not empty ({others[0].name}); give another RUN")


def write_config(run: Path, config: LoopConfig, **facts: Any) -> None:
    """The resolved settings, what was learned from, and the software, for people."""
    content = {
        "config": config.to_dict(),
        **facts,
        "software": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    partial = run / (CONFIG + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(run / CONFIG)


def hold_run(run: Path) -> AbstractContextManager[None]:
    """Keep every other writer out of a run's folder; BusyError when there is one."""
    return hold(run / _LOCK, run)


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

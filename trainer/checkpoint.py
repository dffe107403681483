"""Checkpoints of a run: written completely or not at all, read without executing code."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from store.atomic import replace_file
from trainer.config import LoopConfig, find_differences
from trainer.errors import TrainError

VERSION = 3
LAST, BEST = "last.pt", "best.pt"


@dataclass(slots=True)
class RunState:
    """Position of a run, and sums that a checkpoint must keep.

    The names of the fields are keys of checkpoints: renaming one breaks older files.
    """

    step: int = 0
    """Optimiser steps done."""
    epoch: int = 0
    """Complete epochs done."""
    batch: int = 0
    """Index of the next batch in the current epoch."""
    metrics_bytes: int = 0
    """Size of metrics.jsonl in bytes."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the losses since the last line of metrics, and their number of examples (not an HU
    window)."""
    whole: dict[str, float] = field(default_factory=dict)
    """Sums of the losses since the epoch began, and their number of examples."""
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the best validation of this phase; empty before the first."""
    best_step: int = 0
    best_epoch: int = 0
    joint: bool = False
    """Whether the run is past its warm-up, or has none."""
    last: dict[str, float] = field(default_factory=dict)
    """Metrics of the last validation."""
    lr_cuts: int = 0
    """Times that a plateau has cut the learning rate."""
    lr_cut_epoch: int = 0
    """Epoch of the last such cut."""
    unvalidated: bool = False
    """Whether the last validation was interrupted and must be done when the run is resumed."""

    @classmethod
    def resume(cls, saved: dict[str, Any] | None, *, warmup_epochs: int = 0) -> RunState:
        """The state in a checkpoint's content, or that of a new run without one."""
        state = cls(**saved["progress"]) if saved else cls()
        state.joint = state.joint or not warmup_epochs
        return state


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Replace a checkpoint, so that not even a power failure loses both the old and the new one.

    content
        Tensors, numbers, text, and dicts and lists of these.
    """
    write_torch(path, {"version": VERSION, **content}, durable=True)


def write_torch(path: Path, content: dict[str, Any], *, durable: bool = False) -> None:
    """Replace a torch file; see `store.atomic.replace_file`. Equal content gives equal bytes."""
    packed = io.BytesIO()  # torch's own writer does not report why a file cannot be written
    torch.save(_unshare(content), packed)
    with replace_file(path, durable=durable) as partial:
        partial.write_bytes(packed.getbuffer())


def _unshare(value: Any) -> Any:
    """The value with new dicts, lists and tuples, and one object for equal texts.

    Pickle writes the second mention of an object as a reference, and of an equal one in full.
    """
    if isinstance(value, dict):
        return {_unshare(key): _unshare(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unshare(one) for one in value)
    return sys.intern(value) if type(value) is str else value


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint into main memory; TrainError when it is none of this version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that it did not write
        raise TrainError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); give another RUN"
        ) from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise TrainError(
            f"{path}: expected a checkpoint of version {VERSION}, got {version}; start another RUN,"
            " or use the version of semgen that wrote it"
        )
    assert isinstance(content, dict)
    return content


def load_best(run: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint with the best weights of a run, and its content.

    That is best.pt, or last.pt as long as no validation of the joint phase has chosen a best.pt.
    """
    files = [file for file in (run / BEST, run / LAST) if file.exists()]
    if not files:
        raise TrainError(
            f"{run}: no checkpoint here yet; train this run first, or give another RUN"
        )
    content = load_checkpoint(files[0])
    if len(files) > 1 and in_warmup(content):
        last = load_checkpoint(files[1])
        if not in_warmup(last):
            return files[1], last
    return files[0], content


def in_warmup(content: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved during the warm-up, which leaves the decoder untrained."""
    return bool(content["config"].get("warmup_epochs")) and not content["progress"]["joint"]


def refuse_other_run(
    path: Path,
    saved: dict[str, Any],
    *,
    fingerprint: str,
    config: LoopConfig,
    num_processes: int,
) -> None:
    """Raise TrainError when a checkpoint is of another store or of other settings, naming them.

    The number of processes may change only with `sync_batch_norm`: without it, batch norm depends
    on that number.
    """
    if saved["fingerprint"] != fingerprint:
        raise TrainError(
            f"{path}: trained on data with fingerprint {saved['fingerprint'][:12]}, but these have"
            f" {fingerprint[:12]}; give the same data or another RUN"
        )
    differences = find_differences(saved["config"], config)
    if differences:
        raise TrainError(
            f"{path}: was started with other settings ({'; '.join(differences)}); "
            "give the same settings or another RUN"
        )
    if saved["num_processes"] != num_processes and not saved["config"].get("sync_batch_norm"):
        raise TrainError(
            f"{path}: was trained by {saved['num_processes']} processes, but now there are"
            f" {num_processes}; start {saved['num_processes']} processes again, or a new RUN with"
            " sync_batch_norm, which allows any number"
        )

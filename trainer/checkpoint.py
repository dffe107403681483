"""Checkpoints: written whole or not at all, read without executing code."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.config import LoopConfig, find_differences
from trainer.errors import TrainError

VERSION = 3
LAST, BEST = "last.pt", "best.pt"


@dataclass(slots=True)
class Progress:
    """Where a run stands between two steps; all of it goes into the checkpoint."""

    step: int = 0
    """Optimiser steps done."""
    epoch: int = 0
    """Whole epochs done."""
    batch: int = 0
    """Next batch of the current epoch."""
    metrics_bytes: int = 0
    """Size of metrics.jsonl."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums of losses since the last line of metrics."""
    whole: dict[str, float] = field(default_factory=dict)
    """Sums of losses since the epoch began."""
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the best validation of this phase; empty before the first."""
    best_step: int = 0
    best_epoch: int = 0
    joint: bool = False
    """Whether the warm-up is over."""
    last: dict[str, float] = field(default_factory=dict)
    """Metrics of the last validation."""
    lr_cuts: int = 0
    """How often a plateau has cut the learning rate."""
    lr_cut_epoch: int = 0
    unvalidated: bool = False
    """Whether a validation is due that was interrupted."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write under a temporary name, force to the disk, rename.

    content
        Tensors, numbers, text, and dicts and lists of these.
    """
    partial = path.with_name(path.name + ".partial")
    packed = io.BytesIO()  # torch's own writer does not say why a file cannot be written
    torch.save({"version": VERSION, **content}, packed)
    with partial.open("wb") as file:
        file.write(packed.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read onto the CPU; raises TrainError when it is no checkpoint of this version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); start in another folder"
        ) from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise TrainError(f"{path}: expected a checkpoint of version {VERSION}, got {version}")
    assert isinstance(content, dict)
    return content


def refuse_other_run(
    path: Path,
    saved: dict[str, Any],
    *,
    fingerprint: str,
    config: LoopConfig,
    num_processes: int,
) -> None:
    """Raise TrainError when a checkpoint is of another store or of other settings, naming them.

    Another number of processes can be honoured only where batch norm does not depend on it.
    """
    if saved["fingerprint"] != fingerprint:
        raise TrainError(
            f"{path}: trained on store {saved['fingerprint'][:12]}, this one is "
            f"{fingerprint[:12]}; give the same store or another RUN"
        )
    differences = find_differences(saved["config"], config)
    if differences:
        raise TrainError(
            f"{path}: was started with other settings ({'; '.join(differences)}); "
            "give the same ones or another RUN"
        )
    if saved["num_processes"] != num_processes and not saved["config"].get("sync_batch_norm"):
        raise TrainError(
            f"{path}: was trained by {saved['num_processes']} processes, now there are"
            f" {num_processes}; start as many, or another RUN with sync_batch_norm"
        )

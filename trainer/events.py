"""What a run tells while it goes; a command line renders these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The run is set up."""

    run: Path
    fingerprint: str
    """Of the store."""
    num_train: int
    """Crops in an epoch."""
    num_validation: int
    """Crops in a validation."""
    num_classes: int
    num_parameters: int
    device: str
    steps_per_epoch: int
    total_steps: int
    """Most steps, unless the run stops early."""
    warmup_epochs: int
    resumed_at: int
    """Steps done before; 0 for a new run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Training went on; losses are means since the last such event, unweighted but `loss`."""

    step: int
    """Steps done."""
    total_steps: int
    epoch: int
    """From 0."""
    metrics: dict[str, float]
    """loss, and what there is of restoration, classification, accuracy."""
    learning_rate: float
    cubes_per_s: float
    wait_share: float
    """Share of the time in which training waited for data."""
    remaining_s: float
    """At this rate, without the validations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """A validation is done (or, without validation rows, an epoch's training means)."""

    step: int
    epoch: int
    """Epochs done, from 1."""
    metrics: dict[str, float]
    """loss, and what there is of restoration, identity, classification, accuracy."""
    best: bool
    """Whether this is the best so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Noticed:
    """Something that people should know, in one line."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """How a run ended."""

    run: Path
    reason: str
    """"epochs", "steps" or "patience"."""
    steps: int
    """Optimiser steps done, of all sessions of the run."""
    epochs: int
    """Whole epochs done."""
    best_step: int
    best: dict[str, float]
    """Metrics of the validation that chose best.pt."""
    last: dict[str, float]
    """Metrics of the last validation."""
    num_skipped: int
    """Corrupt crops left out by this call."""
    seconds: float
    """Of this call."""
    already_complete: bool
    """True when there was nothing left to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The run is over."""

    summary: TrainSummary


Event = Started | Stepped | Validated | Saved | Noticed | Ended

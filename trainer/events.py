"""Events of a run, passed to `on_event` as they happen; the command line prints them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from store.progress import format_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Training starts or resumes."""

    run: Path
    fingerprint: str
    """Identifies the data: the store's, or the task's in fine-tuning."""
    num_train: int
    """Training examples in an epoch."""
    num_validation: int
    """Validation examples."""
    num_classes: int
    num_parameters: int
    device: str
    steps_per_epoch: int
    total_steps: int
    """Steps of the complete run, unless it stops early."""
    warmup_epochs: int
    resumed_at: int
    """Steps already done; 0 for a new run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Some more steps are done; metrics are means over the steps since the last such event."""

    step: int
    """Steps done."""
    total_steps: int
    epoch: int
    """From 0."""
    metrics: dict[str, float]
    """"loss" (the weighted sum) and its unweighted parts, such as restoration, classification and
    accuracy."""
    learning_rate: float
    examples_per_s: float
    wait_share: float
    """Fraction of the time that training waited for data."""
    remaining_s: float
    """Estimated seconds until `total_steps`, without validations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """A validation is done. Without validation data, metrics are the epoch's training means."""

    step: int
    epoch: int
    """Epochs done, from 1."""
    metrics: dict[str, float]
    """"loss" and its parts, such as restoration, identity (the restoration loss of the perturbed
    crop itself), classification and accuracy."""
    best: bool
    """Whether the loss is the lowest so far in this phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Noticed:
    """A message for the user, in one line."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """Result of a training run."""

    run: Path
    reason: str
    """Which limit ended it: "epochs", "steps" or "patience"."""
    steps: int
    """Optimiser steps done, including those before the run was resumed."""
    epochs: int
    """Complete epochs done."""
    best_step: int
    best: dict[str, float]
    """Metrics of the validation that chose best.pt."""
    last: dict[str, float]
    """Metrics of the last validation."""
    num_skipped: int = 0
    """Corrupt crops skipped by this call."""
    seconds: float
    """Duration of this call."""
    already_complete: bool
    """Whether the run was complete before this call."""

    def __str__(self) -> str:
        """Lines of text, for a terminal."""
        state = "already complete" if self.already_complete else f"ended by {self.reason}"
        lines = [
            f"{self.run}: {state}, {self.steps} steps, {self.epochs} epochs,"
            f" {format_duration(self.seconds)}",
            f"best at step {self.best_step}: {format_metrics(self.best)}",
        ]
        if self.num_skipped:
            lines.append(f"{self.num_skipped} corrupt crops skipped; run semgen verify")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The run is complete."""

    summary: TrainSummary


Event = Started | Stepped | Validated | Saved | Noticed | Ended


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics by name, on one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def ignore(event: Event) -> None:
    """Show nothing."""

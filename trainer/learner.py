"""What the loop needs from pretraining or fine-tuning: `Learner` does a step and a validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

Losses: TypeAlias = tuple[dict[str, Tensor], int]
"""Mean losses of some examples by name, "loss" among them, and the number of examples."""


class Indexed(Protocol):
    """A batch: its position in the epoch, from 0, and its number of examples."""

    @property
    def index(self) -> int: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Result of a validation."""

    metrics: dict[str, float]
    """By name, "loss" among them; empty without validation data."""
    confusion: Tensor | None = None
    """(classes, classes) number of examples by true and predicted class."""
    pictured: dict[str, Tensor] | None = None
    """Crops (n, 1, Z, Y, X) in [0, 1] by caption, to show side by side."""


BatchT = TypeVar("BatchT", bound=Indexed)
BatchT_contra = TypeVar("BatchT_contra", bound=Indexed, contravariant=True)


class Learner(Protocol[BatchT_contra]):
    """A net with its optimiser and losses."""

    @property
    def net(self) -> nn.Module:
        """The net, whose weights go into checkpoints."""
        ...

    @property
    def optimiser(self) -> torch.optim.Optimizer:
        """The optimiser, whose state goes into checkpoints."""
        ...

    def step(self, batch: BatchT_contra) -> list[Losses]:
        """Do one optimiser step; return the losses of the batch, or of each part of it."""
        ...

    def validate(self, raise_if_interrupted: Callable[[], None]) -> Validation:
        """Measure the net on the validation data; call the argument before each batch."""
        ...

    def begin_joint_phase(self) -> None:
        """Start with a new optimiser after the warm-up; not called in a run without warm-up."""
        ...

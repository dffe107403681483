"""Pretext tasks: each one small class that says how to perturb, what to restore, which loss.

The loop knows no task by name. A new task is a class here and an entry in `PRETEXTS`.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor

from trainer.errors import TrainError
from trainer.losses import restoration_loss
from trainer.models import Output
from trainer.perturb import NUM_BLOCKS, Draws, perturb


class Example(NamedTuple):
    """One batch as the net gets it."""

    inputs: Tensor
    """(n, 1, Z, Y, X) perturbed cubes."""
    target: Tensor
    """What the task is judged by; here (n, 1, Z, Y, X) cubes as they were."""


class Pretext:
    """A task whose labels come from the perturbation itself: this one has none of its own.

    It perturbs by the Models Genesis mix, so that self-classification alone sees what it
    would see beside another task.
    """

    metric: ClassVar[str | None] = None
    """Name of the task's loss in metrics; None for a task without a loss of its own."""
    decodes: ClassVar[bool] = False
    """Whether the net needs its decoder."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        """`num_blocks` of local shuffling."""
        self.num_blocks = num_blocks

    def perturb(self, cubes: Tensor, draws: Draws) -> Example:
        """Make the batch's task; `cubes` stay as they are."""
        return Example(perturb(cubes, draws, num_blocks=self.num_blocks), cubes)

    def loss(self, output: Output, example: Example) -> Tensor | None:
        """The task's loss, unweighted."""
        return None

    def baseline(self, example: Example) -> dict[str, Tensor]:
        """What a net that learned nothing would get, by metric name."""
        return {}


class Restoration(Pretext):
    """Models Genesis: recover the cube from its perturbed self."""

    metric = "restoration"
    decodes = True

    def loss(self, output: Output, example: Example) -> Tensor | None:
        assert output.restored is not None
        return restoration_loss(output.restored, example.target)

    def baseline(self, example: Example) -> dict[str, Tensor]:
        """`identity`: the loss of handing back the perturbed cube."""
        return {"identity": restoration_loss(example.inputs, example.target)}


PRETEXTS: dict[str, type[Pretext]] = {
    "restoration": Restoration,
    "none": Pretext,
}
"""Every task by the name that users give."""


def make_pretext(name: str, *, num_blocks: int = NUM_BLOCKS) -> Pretext:
    """The task of that name; TrainError lists the names there are."""
    if name not in PRETEXTS:
        raise TrainError(f"pretext must be one of {', '.join(PRETEXTS)}; got {name!r}")
    return PRETEXTS[name](num_blocks)

"""Pretext tasks: each one small class that says how to perturb, which head, which loss.

The loop knows no task by name. A new task is a class here and an entry in `PRETEXTS`.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from trainer.errors import TrainError
from trainer.losses import classification_loss, restoration_loss
from trainer.nets.unet import Output
from trainer.transforms.perturb import (
    NUM_BLOCKS,
    Draws,
    find_rotations,
    jumble,
    paint_inside,
    perturb,
    rotate,
    swap_patches,
)

NUM_ORDERS = 100


class Example(NamedTuple):
    """One batch as the net gets it."""

    inputs: Tensor
    """(n, 1, Z, Y, X) perturbed cubes."""
    target: Tensor
    """What the task is judged by: the cubes as they were, or the answers to its questions."""


class Pretext:
    """A task whose labels come from the perturbation itself: this one has none of its own.

    It perturbs by the Models Genesis mix, so that self-classification alone sees what it
    would see beside another task.
    """

    metric: ClassVar[str | None] = None
    """Name of the task's loss in metrics; None for a task without a loss of its own."""
    decodes: ClassVar[bool] = False
    """Whether the net needs its decoder."""
    blocks: ClassVar[int] = 1
    """In how many parts each axis is encoded, each part of a cube by itself."""
    classification_weight: ClassVar[float] = 1.0
    """Of self-classification beside it, unless a run says otherwise."""

    def __init__(self, shape: tuple[int, ...], *, num_blocks: int = NUM_BLOCKS) -> None:
        """For crops of `shape` (Z, Y, X); `num_blocks` of local shuffling."""
        self.shape, self.num_blocks = shape, num_blocks

    def make_head(self, channels: int) -> nn.Module | None:
        """A head of the task's own: bottleneck (n, channels, z, y, x) -> answers (n, answers)."""
        return None

    def perturb(self, cubes: Tensor, draws: Draws) -> Example:
        """Make the batch's task; `cubes` stay as they are."""
        return Example(perturb(cubes, draws, num_blocks=self.num_blocks), cubes)

    def loss(self, output: Output, example: Example) -> Tensor | None:
        """The task's loss, unweighted."""
        return None

    def measure(self, output: Output, example: Example) -> dict[str, Tensor]:
        """Further metrics by name."""
        return {}

    def baseline(self, example: Example) -> dict[str, Tensor]:
        """What a net that learned nothing would get, by metric name."""
        return {}


class Restoration(Pretext):
    """Models Genesis: recover the cube from its perturbed self."""

    metric = "restoration"
    decodes = True
    classification_weight = 0.01

    def loss(self, output: Output, example: Example) -> Tensor | None:
        assert output.restored is not None
        return restoration_loss(output.restored, example.target)

    def baseline(self, example: Example) -> dict[str, Tensor]:
        """`identity`: the loss of handing back the perturbed cube."""
        return {"identity": restoration_loss(example.inputs, example.target)}


class Inpainting(Restoration):
    """Recover what noise boxes hide."""

    metric = "inpainting"

    def perturb(self, cubes: Tensor, draws: Draws) -> Example:
        return Example(paint_inside(cubes, draws), cubes)


class Shuffling(Restoration):
    """Put swapped patches back: context restoration (Chen et al., Medical Image Analysis 2019)."""

    metric = "shuffling"

    def perturb(self, cubes: Tensor, draws: Draws) -> Example:
        return Example(swap_patches(cubes, draws), cubes)


class Rotation(Pretext):
    """Name the rotation, among those that map the crop's box onto itself."""

    metric = "rotation"

    def make_head(self, channels: int) -> nn.Module:
        answers = len(find_rotations(self.shape))
        return nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, answers))

    def perturb(self, cubes: Tensor, draws: Draws) -> Example:
        return Example(*rotate(cubes, draws))

    def loss(self, output: Output, example: Example) -> Tensor | None:
        assert output.answers is not None
        return classification_loss(output.answers, example.target)

    def measure(self, output: Output, example: Example) -> dict[str, Tensor]:
        assert output.answers is not None
        return {"rotation_accuracy": _share_right(output.answers, example.target)}


class Rubik(Pretext):
    """Name the order of eight sub-cubes, and which of them are rotated (Zhuang et al. 2019).

    As published, sub-cubes are encoded each by itself, so that no seam between them tells.
    """

    metric = "rubik"
    blocks = 2

    def make_head(self, channels: int) -> nn.Module:
        parts = self.blocks**3
        return nn.Sequential(
            nn.AdaptiveAvgPool3d(self.blocks),  # (n, channels, 2, 2, 2): one a sub-cube
            nn.Flatten(),
            nn.Linear(parts * channels, NUM_ORDERS + parts),
        )

    def perturb(self, cubes: Tensor, draws: Draws) -> Example:
        jumbled, order, rotated = jumble(cubes, draws, num_orders=NUM_ORDERS)
        return Example(jumbled, torch.cat((order[:, None], rotated.long()), dim=1))  # (n, 9)

    def loss(self, output: Output, example: Example) -> Tensor | None:
        order, rotated = self._answers(output)
        of_order = classification_loss(order, example.target[:, 0])
        return of_order + F.binary_cross_entropy_with_logits(rotated, example.target[:, 1:].float())

    def measure(self, output: Output, example: Example) -> dict[str, Tensor]:
        order, rotated = self._answers(output)
        right = (rotated > 0) == example.target[:, 1:].bool()
        return {
            "order_accuracy": _share_right(order, example.target[:, 0]),
            "rotated_accuracy": right.float().mean(),
        }

    def _answers(self, output: Output) -> tuple[Tensor, Tensor]:
        """Logits (n, 100) of the order and (n, 8) of being rotated."""
        assert output.answers is not None
        return output.answers[:, :NUM_ORDERS], output.answers[:, NUM_ORDERS:].float()


def _share_right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


PRETEXTS: dict[str, type[Pretext]] = {
    "restoration": Restoration,
    "inpainting": Inpainting,
    "shuffling": Shuffling,
    "rotation": Rotation,
    "rubik": Rubik,
    "none": Pretext,
}
"""Every task by the name that users give."""


def make_pretext(name: str, shape: tuple[int, ...], *, num_blocks: int = NUM_BLOCKS) -> Pretext:
    """The task of that name; TrainError lists the names there are."""
    if name not in PRETEXTS:
        raise TrainError(f"pretext must be one of {', '.join(PRETEXTS)}; got {name!r}")
    return PRETEXTS[name](shape, num_blocks=num_blocks)

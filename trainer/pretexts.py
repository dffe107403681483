"""Pretext tasks: each is one small class with its perturbation, its head and its loss.

To add a task, write a class here, enter it in `PRETEXTS`, and add its name to
`trainer.config.PretextName`; for the page of a run, one that restores crops to `_RESTORING` in
trainer/report/runs.py, and words for its metrics to trainer/report/page/words.js.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from trainer.config import PretextName, TrainConfig
from trainer.data.dataset import Batch
from trainer.errors import TrainError
from trainer.losses import classification_loss, masked_loss, restoration_loss
from trainer.nets.pretraining import Output
from trainer.transforms.draws import Draws
from trainer.transforms.genesis import perturb_genesis
from trainer.transforms.mask import BlockGrid, hide
from trainer.transforms.paint import inpaint
from trainer.transforms.rotate import find_rotations, rotate
from trainer.transforms.rubik import scramble_rubik
from trainer.transforms.swap import swap_patches

NUM_ORDERS = 100
"""Number of orders that the Rubik task classifies."""


class Example(NamedTuple):
    """One batch of a pretext task."""

    inputs: Tensor
    """(n, 1, Z, Y, X) perturbed crops, the net's input."""
    target: Tensor
    """What the net is trained to predict: the original crops, or labels."""
    mask: Tensor | None = None
    """(n, 1, Z, Y, X) bool: voxels that the loss counts; None where it counts all."""

    def split(self, num_parts: int) -> list[Example]:
        """The batch in parts of almost equal size, some of them empty where crops are few."""
        columns = [
            [None] * num_parts if values is None else values.tensor_split(num_parts)
            for values in self
        ]
        return [Example(*parts) for parts in zip(*columns, strict=True)]


class Pretext:
    """Base of all tasks, and the task "none", which has no loss of its own.

    "none" perturbs crops by the Models Genesis mix, so that classification alone is trained on the
    same inputs as with the restoration task.
    """

    metric: ClassVar[str | None] = None
    """Name of the task's loss in the metrics; None for a task without a loss."""
    decodes: ClassVar[bool] = False
    """Whether the net needs its decoder."""
    parts_per_axis: ClassVar[int] = 1
    """Sub-cubes along each axis into which a crop is split; each is encoded alone."""
    classification_weight: ClassVar[float] = 1.0
    """Default weight of the classification loss when it is added to this task."""
    classifies_originals: ClassVar[bool] = False
    """Whether the classification head learns from the original crops, encoded in the same pass as
    the perturbed ones, instead of from the perturbed ones. The task's target must be the crops."""

    def __init__(self, shape: tuple[int, ...], config: TrainConfig) -> None:
        """A task for crops of (Z, Y, X) `shape`; raises TrainError where settings do not fit."""
        self.shape, self.config = shape, config

    def make_head(self, channels: int) -> nn.Module | None:
        """The task's own head: bottleneck (n, channels, z, y, x) -> logits (n, outputs)."""
        return None

    def perturb(self, crops: Tensor, draws: Draws) -> Example:
        """Perturb a batch; `crops` are not changed."""
        num_blocks = self.config.shuffle_blocks
        return Example(perturb_genesis(crops, draws, num_blocks=num_blocks), crops)

    def make_example(self, batch: Batch, role: str = "train") -> Example:
        """Perturb a batch, which is not changed; as z-scores where the batch has these.

        role
            "train" perturbs a crop differently in each epoch, any other role always the same way.

        The result depends only on crops, seed, role, epoch and rows.
        """
        index = (batch.epoch,) if role == "train" else ()
        device = batch.crops.device
        draws = Draws.keyed(self.config.seed, role, *index, rows=batch.rows, device=device)
        example = self.perturb(batch.images(), draws)
        if batch.zscores is None:
            return example
        target = batch.zscores.apply(example.target) if self.decodes else example.target
        return example._replace(inputs=batch.zscores.apply(example.inputs), target=target)

    def loss(self, output: Output, example: Example) -> Tensor | None:
        """The task's loss, unweighted."""
        return None

    def measure(self, output: Output, example: Example) -> dict[str, Tensor]:
        """More metrics by name."""
        return {}

    def baseline(self, example: Example) -> dict[str, Tensor]:
        """Metrics of a trivial prediction to compare with, by name."""
        return {}

    def show(self, restored: Tensor, example: Example) -> dict[str, Tensor]:
        """What a picture shows of a task with a decoder: crops (n, 1, Z, Y, X) by caption."""
        return {"perturbed": example.inputs, "restored": restored, "original": example.target}


class Restoration(Pretext):
    """Restore the original crop from the perturbed one (Models Genesis)."""

    metric = "restoration"
    decodes = True
    classification_weight = 0.01

    def loss(self, output: Output, example: Example) -> Tensor | None:
        assert output.restored is not None
        return restoration_loss(output.restored, example.target)

    def baseline(self, example: Example) -> dict[str, Tensor]:
        """`identity`: the loss when the perturbed crop itself is the prediction."""
        return {"identity": restoration_loss(example.inputs, example.target)}


class Inpainting(Restoration):
    """Restore what boxes of noise hide."""

    metric = "inpainting"

    def perturb(self, crops: Tensor, draws: Draws) -> Example:
        return Example(inpaint(crops, draws), crops)


class Shuffling(Restoration):
    """Restore swapped patches (context restoration: Chen et al., Medical Image Analysis 2019)."""

    metric = "shuffling"

    def perturb(self, crops: Tensor, draws: Draws) -> Example:
        return Example(swap_patches(crops, draws), crops)


class MaskedAutoencoding(Restoration):
    """Restore hidden blocks from the visible ones (He et al. 2022; in 3-D: Wald et al. 2025).

    Dense: hidden voxels are air, and the whole crop is encoded. An ordinary convolution net needs
    no sparse convolutions for it, and its weights suit complete images as they are; the price is
    computing on the hidden three quarters, too.

    The loss counts hidden voxels only. Classes are learned from complete crops, which the encoder
    gets in the same pass: a crop of which a quarter is visible is not what is classified later,
    and batch norm collects its statistics from both kinds of input.
    """

    metric = "mae"
    classifies_originals = True

    def __init__(self, shape: tuple[int, ...], config: TrainConfig) -> None:
        super().__init__(shape, config)
        self.grid = BlockGrid(shape, ratio=config.mask_ratio, block=config.mask_block)

    def perturb(self, crops: Tensor, draws: Draws) -> Example:
        mask = self.grid.draw(draws)
        return Example(hide(crops, mask), crops, mask)

    def loss(self, output: Output, example: Example) -> Tensor | None:
        assert output.restored is not None
        assert example.mask is not None
        return masked_loss(output.restored, example.target, example.mask)

    def baseline(self, example: Example) -> dict[str, Tensor]:
        """`visible_mean`: the loss when the mean of a crop's visible voxels is predicted."""
        assert example.mask is not None
        visible = ~example.mask
        axes = (1, 2, 3, 4)
        total = (example.target * visible).sum(axes, keepdim=True)
        mean = total / visible.sum(axes, keepdim=True)  # (n, 1, 1, 1, 1)
        return {"visible_mean": masked_loss(mean, example.target, example.mask)}

    def show(self, restored: Tensor, example: Example) -> dict[str, Tensor]:
        assert example.mask is not None
        return {
            "masked": example.inputs,
            "restored": restored,
            "pasted": torch.where(example.mask, restored.to(example.target), example.target),
            "original": example.target,
        }


class Rotation(Pretext):
    """Classify the rotation, among those that map the crop's box onto itself."""

    metric = "rotation"

    def make_head(self, channels: int) -> nn.Module:
        num_rotations = len(find_rotations(self.shape))
        return nn.Sequential(
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, num_rotations)
        )

    def perturb(self, crops: Tensor, draws: Draws) -> Example:
        return Example(*rotate(crops, draws))

    def loss(self, output: Output, example: Example) -> Tensor | None:
        assert output.pretext_logits is not None
        return classification_loss(output.pretext_logits, example.target)

    def measure(self, output: Output, example: Example) -> dict[str, Tensor]:
        assert output.pretext_logits is not None
        return {"rotation_accuracy": _accuracy(output.pretext_logits, example.target)}


class Rubik(Pretext):
    """Classify the order of eight sub-cubes, and which of them are rotated (Zhuang et al. 2019).

    As published, each sub-cube is encoded alone, so that the edges between them reveal nothing.
    """

    metric = "rubik"
    parts_per_axis = 2

    def make_head(self, channels: int) -> nn.Module:
        num_subcubes = self.parts_per_axis**3
        return nn.Sequential(
            nn.AdaptiveAvgPool3d(
                self.parts_per_axis
            ),  # (n, channels, 2, 2, 2): one cell a sub-cube
            nn.Flatten(),
            nn.Linear(num_subcubes * channels, NUM_ORDERS + num_subcubes),
        )

    def perturb(self, crops: Tensor, draws: Draws) -> Example:
        scrambled, order, rotated = scramble_rubik(crops, draws, num_orders=NUM_ORDERS)
        return Example(scrambled, torch.cat((order[:, None], rotated.long()), dim=1))  # (n, 9)

    def loss(self, output: Output, example: Example) -> Tensor | None:
        order, rotated = self._answers(output)
        of_order = classification_loss(order, example.target[:, 0])
        return of_order + F.binary_cross_entropy_with_logits(rotated, example.target[:, 1:].float())

    def measure(self, output: Output, example: Example) -> dict[str, Tensor]:
        order, rotated = self._answers(output)
        right = (rotated > 0) == example.target[:, 1:].bool()
        return {
            "order_accuracy": _accuracy(order, example.target[:, 0]),
            "rotated_accuracy": right.float().mean(),
        }

    def _answers(self, output: Output) -> tuple[Tensor, Tensor]:
        """Logits: (n, 100) of the order, and (n, 8) of each place being rotated."""
        assert output.pretext_logits is not None
        return output.pretext_logits[:, :NUM_ORDERS], output.pretext_logits[:, NUM_ORDERS:].float()


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


PRETEXTS: dict[PretextName, type[Pretext]] = {
    "restoration": Restoration,
    "inpainting": Inpainting,
    "shuffling": Shuffling,
    "mae": MaskedAutoencoding,
    "rotation": Rotation,
    "rubik": Rubik,
    "none": Pretext,
}
"""All tasks by their names in `TrainConfig.pretext`."""


def find_pretext(config: TrainConfig) -> type[Pretext]:
    """The task that `config` names; TrainError where it names none."""
    if config.pretext is None:
        raise TrainError(
            "pretext is None: name a task, or pass one as pretrain(..., pretext=...); to perturb"
            " with your own task, use its make_example"
        )
    return PRETEXTS[config.pretext]


def perturb(batch: Batch, config: TrainConfig | None = None) -> Example:
    """Perturb a batch for the pretext task in `config`, as `pretrain` with these settings does.

    config
        Its `pretext`, `seed`, `shuffle_blocks` and `mask_` settings are used. Default:
        `TrainConfig()`, which is "restoration".

    Returns `inputs` (n, 1, Z, Y, X) float32; `target`, the original crops, or the labels of a task
    that classifies; and `mask`, the voxels that the loss counts, where it does not count all. Crops
    are in [0, 1], the HU window, or z-scores if the dataset has these. Each crop is perturbed anew
    in each epoch, and always the same way in the same one.

    Raises TrainError where the settings do not fit the crops' shape.
    """
    return _make_pretext(tuple(batch.crops.shape[2:]), config or TrainConfig()).make_example(batch)


@lru_cache
def _make_pretext(shape: tuple[int, ...], config: TrainConfig) -> Pretext:
    return find_pretext(config)(shape, config)

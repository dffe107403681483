"""Random blocks of a crop are hidden, for masked autoencoding."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.device import upload
from trainer.errors import TrainError
from trainer.transforms.draws import Draws

HIDDEN_VALUE = 0.0
"""Value of hidden voxels: the low end of the HU window, that is air."""
MAX_BLOCK, MIN_BLOCK, BLOCKS_PER_SIDE = 16, 4, 6


def default_block(shape: tuple[int, ...]) -> int:
    """The side of a block, in voxels, for crops of (Z, Y, X) `shape`.

    The largest power of two that fits six times into the longest side, but from 4 to 16: smaller
    crops get smaller blocks, so that what is visible still shows where in the body the crop is.

    >>> default_block((96, 96, 96)), default_block((32, 64, 64)), default_block((16, 32, 32))
    (16, 8, 4)
    """
    fitting = max(1, max(shape) // BLOCKS_PER_SIDE)
    power = 1 << (fitting.bit_length() - 1)
    return min(max(power, MIN_BLOCK), MAX_BLOCK)


class BlockGrid:
    """The blocks of a crop, and how many of them are hidden.

    The grid starts at the crop's first voxel; where a side is no multiple of the block, the last
    blocks along it are cut off.
    """

    def __init__(self, shape: tuple[int, ...], *, ratio: float, block: int | None = None) -> None:
        """Blocks of crops of (Z, Y, X) `shape`.

        ratio
            Share of the blocks that is hidden, rounded to a whole number of blocks.
        block
            Side of a block in voxels; None for `default_block`.

        Raises TrainError where no block, or every block, would be hidden.
        """
        self.shape = shape
        self.block = default_block(shape) if block is None else block
        self.size = tuple(-(-side // self.block) for side in shape)
        self.num_blocks = self.size[0] * self.size[1] * self.size[2]
        self.num_hidden = round(ratio * self.num_blocks)
        if not 0 < self.num_hidden < self.num_blocks:
            raise TrainError(
                f"mask_ratio {ratio:g} hides {self.num_hidden} of the {self.num_blocks} blocks of"
                f" {self.block} voxels in a crop of {shape} (z, y, x); some must be hidden and some"
                " visible: choose another mask_ratio or a smaller mask_block"
            )

    def draw(self, draws: Draws) -> Tensor:
        """(n, 1, Z, Y, X) bool on the device of the draws: hidden voxels.

        Exactly `num_hidden` blocks of each crop, all choices equally likely.
        """
        order = draws.uniform(self.num_blocks).argsort(1)  # (n, blocks)
        hidden = torch.zeros(len(draws), self.num_blocks, dtype=torch.bool)
        hidden.scatter_(1, order[:, : self.num_hidden], True)
        mask = upload(hidden, draws.device).reshape(-1, 1, *self.size)
        for axis, side in enumerate(self.shape, 2):
            mask = mask.repeat_interleave(self.block, axis).narrow(axis, 0, side)
        return mask


def hide(crops: Tensor, mask: Tensor) -> Tensor:
    """A copy of crops (n, 1, Z, Y, X) in which masked voxels are air."""
    return crops.masked_fill(mask, HIDDEN_VALUE)

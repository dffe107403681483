"""In-painting and out-painting: noise inside random boxes, or everywhere outside them."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.device import upload
from trainer.transforms.draws import Draws

MAX_BOXES = 5
NEXT_BOX_PROBABILITY = 0.95
MARGIN_VOXELS = 3


def _draw_boxes(low: Tensor, high: Tensor, count: Tensor, crops: Tensor, draws: Draws) -> Tensor:
    """Voxels inside any of a crop's boxes, as (n, 1, Z, Y, X) bool.

    low, high
        (3,) smallest and largest sides of a box in voxels.
    count
        (n,) boxes of each crop.
    """
    shape = crops.shape[2:]
    extent = torch.tensor(shape)
    side = draws.integers(low, high, MAX_BOXES, 3)
    margin = torch.minimum(torch.tensor(MARGIN_VOXELS), (extent - side) // 2)
    corner = draws.integers(margin, extent - side - margin, MAX_BOXES, 3)
    unused = torch.arange(MAX_BOXES) >= count[:, None]  # (n, boxes)
    side = side.masked_fill(unused[:, :, None], 0)
    inside = [
        (torch.arange(length) >= corner[:, :, axis, None])
        & (torch.arange(length) < (corner + side)[:, :, axis, None])
        for axis, length in enumerate(shape)
    ]  # (n, boxes, length) of each axis: a box is their product
    z, y, x = (upload(part, crops.device).float() for part in inside)
    return torch.einsum("nbz,nby,nbx->nzyx", z, y, x)[:, None] > 0


def _draw_counts(first: int, draws: Draws) -> Tensor:
    """(n,) numbers of boxes: at least `first`; each further one with probability 0.95, up to 5."""
    has_next = draws.uniform(MAX_BOXES - first) < NEXT_BOX_PROBABILITY
    return first + has_next.long().cumprod(1).sum(1)


def inpaint(crops: Tensor, draws: Draws) -> Tensor:
    """Put noise in up to five boxes with sides of 1/6 to 1/3 of the extent."""
    extent = torch.tensor(crops.shape[2:])
    count = _draw_counts(0, draws)
    boxes = _draw_boxes((extent // 6).clamp_min(1), (extent // 3).clamp_min(1), count, crops, draws)
    return torch.where(boxes, draws.noise(*crops.shape[1:]), crops)


def outpaint(crops: Tensor, draws: Draws) -> Tensor:
    """Put noise everywhere outside one to five boxes with sides of 3/7 to 4/7 of the extent."""
    extent = torch.tensor(crops.shape[2:])
    count = _draw_counts(1, draws)
    boxes = _draw_boxes(extent - 4 * extent // 7, extent - 3 * extent // 7, count, crops, draws)
    return torch.where(boxes, crops, draws.noise(*crops.shape[1:]))

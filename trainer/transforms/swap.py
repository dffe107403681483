"""Patch swaps: pairs of small patches of a crop change places (context restoration)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from trainer.device import upload
from trainer.transforms.draws import Draws
from trainer.transforms.shuffle import flatten_index

NUM_SWAPS = 10
_SWAP_TRIES = 16


def swap_patches(crops: Tensor, draws: Draws, *, num_swaps: int = NUM_SWAPS) -> Tensor:
    """Swap `num_swaps` pairs of disjoint patches, one pair after the other.

    Both patches of a pair have the same sides, each from an eighth to a quarter of the extent.
    """
    shape = tuple(crops.shape[2:])
    extent = torch.tensor(shape)
    low, high = (extent // 8).clamp_min(1), (extent // 4).clamp_min(1)
    side = draws.integers(low, high, num_swaps, 3)  # (n, swaps, 3)
    corners = draws.integers(0, (extent - side)[:, :, None, None], num_swaps, _SWAP_TRIES, 2, 3)
    apart = (corners[..., 0, :] - corners[..., 1, :]).abs() >= side[:, :, None]
    first = apart.any(-1).int().argmax(-1)  # (n, swaps): the first of the tries that is disjoint
    corners = corners.take_along_dim(first[:, :, None, None, None], 2)[:, :, 0]  # (n, swaps, 2, 3)

    offset = torch.cartesian_prod(*(torch.arange(int(length)) for length in high))  # (voxels, 3)
    start = flatten_index(corners.reshape(-1, 3), shape).reshape(*corners.shape[:3], 1)
    offset, start, side = (upload(part, crops.device) for part in (offset, start, side))
    inside = (offset < side[:, :, None]).all(-1)  # (n, swaps, voxels)
    volume = crops[0].numel()  # of the index: an extra voxel
    index = (start + flatten_index(offset, shape)).masked_fill(~inside[:, :, None], volume)
    swapped = F.pad(crops.reshape(len(crops), -1), (0, 1))  # (n, voxels + 1)
    for first_patch, second_patch in index.permute(1, 2, 0, 3):
        patch = swapped.gather(1, first_patch)
        swapped.scatter_(1, first_patch, swapped.gather(1, second_patch))
        swapped.scatter_(1, second_patch, patch)
    return swapped[:, :-1].reshape(crops.shape)

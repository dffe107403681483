"""Local pixel shuffling: voxels change places inside many small blocks."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from trainer.device import upload
from trainer.transforms.draws import Draws


@lru_cache(maxsize=8)
def _block_offsets(
    largest: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets of the voxels of every possible block in one list; start and size of each block.

    An offset counts from the block's first voxel, in the flattened crop. A block with sides
    (z, y, x) is entry ((z - 1) * Y + y - 1) * X + x - 1.
    """
    offsets = []
    for sides in itertools.product(*(range(1, side + 1) for side in largest)):
        z, y, x = np.indices(sides).reshape(3, -1)
        offsets.append((z * shape[1] + y) * shape[2] + x)
    sizes = np.array([len(part) for part in offsets])
    joined, starts = torch.from_numpy(np.concatenate(offsets)), np.cumsum(sizes) - sizes
    return joined, torch.from_numpy(starts), torch.from_numpy(sizes)


def flatten_index(zyx: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(n,) positions in a flattened (Z, Y, X) array, from (n, 3) voxel indices z, y, x."""
    return (zyx[:, 0] * shape[1] + zyx[:, 1]) * shape[2] + zyx[:, 2]


def shuffle_pixels(crops: Tensor, draws: Draws, *, num_blocks: int) -> Tensor:
    """Shuffle the voxels inside `num_blocks` small blocks, sides from 1 to a tenth of the extent.

    As published, each block shuffles the *original* voxels and later blocks overwrite earlier
    ones.
    """
    if not num_blocks:
        return crops.clone()
    return torch.stack([_shuffle_crop(c, draws.of([i]), num_blocks) for i, c in enumerate(crops)])


def _shuffle_crop(crop: Tensor, draws: Draws, num_blocks: int) -> Tensor:
    """Shuffle one (1, Z, Y, X) crop: one at a time fits the processor's cache.

    All blocks are done at once. List the voxels of block after block (the members), shuffle the
    list within blocks, and let each voxel take the value of the last member that covers it.
    """
    shape, volume, device = tuple(crop.shape[1:]), crop.numel(), crop.device
    largest = tuple(max(1, side // 10) for side in shape)
    offsets, starts, sizes = _block_offsets(largest, shape)
    sides = draws.integers(1, torch.tensor(largest), num_blocks, 3)[0]  # (blocks, 3)
    corner = draws.integers(0, torch.tensor(shape) - sides, num_blocks, 3)[0]  # (blocks, 3)
    kind = flatten_index(sides - 1, largest)
    size = sizes[kind]
    num_members = int(size.sum())
    entry = starts[kind] - (size.cumsum(0) - size)  # offset of the first member, less its place

    # A member's key is block | random bits | voxel: one sort shuffles within every block.
    voxel_bits = volume.bit_length()
    random_bits = min(30, 62 - voxel_bits - num_blocks.bit_length())
    head = (torch.arange(num_blocks) << (random_bits + voxel_bits)) + flatten_index(corner, shape)
    size, head, entry, offsets = (upload(part, device) for part in (size, head, entry, offsets))
    place = torch.arange(num_members, device=device)
    keys = entry.repeat_interleave(size, output_size=num_members).add_(place)
    keys = offsets.take(keys).add_(head.repeat_interleave(size, output_size=num_members))
    voxel = keys & ((1 << voxel_bits) - 1)
    keys += draws.bits(1 << random_bits, num_members)[0].long() << voxel_bits
    source = _sort(keys).bitwise_and_((1 << voxel_bits) - 1)

    last = torch.full((volume,), -1, device=device)
    last.scatter_reduce_(0, voxel, place, "amax")
    shuffled = crop.take(source.take(last.clamp_min(0))).reshape(crop.shape)
    return torch.where(last.reshape(crop.shape) < 0, crop, shuffled)


def _sort(keys: Tensor) -> Tensor:
    """Sort in ascending order; on the CPU with NumPy, whose sort is many times faster."""
    if keys.device.type != "cpu":
        return keys.sort().values
    keys.numpy().sort()
    return keys

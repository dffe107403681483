"""Rubik's cube: eight sub-cubes in another order, some of them rotated."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from trainer.nets.blocks import join_blocks, split_blocks
from trainer.transforms.draws import Draws


@lru_cache
def find_permutations(num: int, length: int = 8) -> Tensor:
    """Choose (num, length) permutations that are far apart, one after the other.

    Each next one has the largest Hamming distance to the nearest of those before; among equals,
    the largest sum of distances to all of them.
    """
    every = np.array(list(itertools.permutations(range(length))), np.int8)
    nearest, total = np.full(len(every), length + 1), np.zeros(len(every), int)
    chosen: list[int] = []
    while len(chosen) < num:
        chosen.append(int(np.lexsort((-total, -nearest))[0]))
        distance = (every != every[chosen[-1]]).sum(1)
        nearest, total = np.minimum(nearest, distance), total + distance
    return torch.from_numpy(every[chosen].astype(np.int64))


def scramble_rubik(
    cubes: Tensor, draws: Draws, *, num_orders: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut cubes into 2 x 2 x 2 parts, reorder them, and rotate half of them by 180 degrees.

    Returns the new cubes; the (n,) number in `find_permutations(num_orders)` of each cube's order
    (place i holds part order[i]); and (n, 8) bool, whether the part at each place was rotated,
    about z or about y.
    """
    num = len(cubes)
    parts = split_blocks(cubes, 2).reshape(num, 8, *(side // 2 for side in cubes.shape[2:]))
    chosen = draws.integers(0, num_orders - 1)
    order = find_permutations(num_orders)[chosen].to(cubes.device)  # (n, 8)
    parts = parts.take_along_dim(order[:, :, None, None, None], 1)
    # rotated about z (0) or y (1), or not at all (2 and 3)
    about = draws.integers(0, 3, 8).to(cubes.device)[:, :, None, None, None]
    parts = torch.where(about == 0, parts.flip((3, 4)), parts)
    parts = torch.where(about == 1, parts.flip((2, 4)), parts)
    scrambled = join_blocks(parts.reshape(num * 8, 1, *parts.shape[2:]), 2)
    return scrambled, chosen.to(cubes.device), (about < 2).reshape(num, 8)

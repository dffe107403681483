"""Rubik's cube: eight sub-cubes in another order, some of them rotated."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from trainer.device import upload
from trainer.nets.subcubes import join_subcubes, split_subcubes
from trainer.transforms.draws import Draws

NUM_SUBCUBES = 8


@lru_cache
def find_permutations(num: int) -> Tensor:
    """Choose (num, 8) permutations of eight sub-cubes that are far apart, one after the other.

    Each next one has the largest Hamming distance to the nearest of those before; among equals,
    the largest sum of distances to all of them.
    """
    every = np.array(list(itertools.permutations(range(NUM_SUBCUBES))), np.int8)
    nearest, total = np.full(len(every), NUM_SUBCUBES + 1), np.zeros(len(every), int)
    chosen: list[int] = []
    while len(chosen) < num:
        chosen.append(int(np.lexsort((-total, -nearest))[0]))
        distance = (every != every[chosen[-1]]).sum(1)
        nearest, total = np.minimum(nearest, distance), total + distance
    return torch.from_numpy(every[chosen].astype(np.int64))


def scramble_rubik(
    crops: Tensor, draws: Draws, *, num_orders: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut crops into 2 x 2 x 2 sub-cubes, reorder them, and rotate half of them by 180 degrees.

    Returns the new crops; the (n,) number in `find_permutations(num_orders)` of each crop's order
    (place i holds sub-cube order[i]); and (n, 8) bool, whether the sub-cube at each place was
    rotated, about z or about y.
    """
    num = len(crops)
    subcubes = split_subcubes(crops, 2).reshape(num, 8, *(side // 2 for side in crops.shape[2:]))
    chosen = draws.integers(0, num_orders - 1)
    order = upload(find_permutations(num_orders)[chosen], crops.device)  # (n, 8)
    subcubes = subcubes.take_along_dim(order[:, :, None, None, None], 1)
    # rotated about z (0) or y (1), or not at all (2 and 3)
    about = upload(draws.integers(0, 3, 8), crops.device)[:, :, None, None, None]
    subcubes = torch.where(about == 0, subcubes.flip((3, 4)), subcubes)
    subcubes = torch.where(about == 1, subcubes.flip((2, 4)), subcubes)
    scrambled = join_subcubes(subcubes.reshape(num * 8, 1, *subcubes.shape[2:]), 2)
    return scrambled, upload(chosen, crops.device), (about < 2).reshape(num, 8)

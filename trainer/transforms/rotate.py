"""Rotations that map the box of a crop onto itself."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from trainer.device import upload
from trainer.transforms.draws import Draws


@lru_cache
def find_rotations(shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """All rotations that map a (Z, Y, X) box onto itself, as (order of axes, axes to flip then).

    The first one changes nothing. There are 24 for a cube, 8 where two sides are equal, else 4.
    """
    found = []
    for axes in itertools.permutations(range(3)):
        if tuple(shape[axis] for axis in axes) != tuple(shape):
            continue
        for flips in itertools.product((1, -1), repeat=3):
            matrix = np.eye(3)[list(axes)] * np.array(flips)[:, None]
            if np.linalg.det(matrix) > 0:  # a rotation, no mirror image
                found.append((axes, tuple(a for a in range(3) if flips[a] < 0)))
    return tuple(found)


def rotate(crops: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Rotate each crop by one of `find_rotations`, all equally likely.

    Returns the rotated crops and the (n,) numbers of their rotations.
    """
    rotations = find_rotations(tuple(crops.shape[2:]))
    chosen = draws.integers(0, len(rotations) - 1)
    rotated = torch.empty_like(crops)
    for number, (axes, flips) in enumerate(rotations):
        members = upload(torch.nonzero(chosen == number).flatten(), crops.device)
        turned = crops[members].permute(0, 1, *(2 + axis for axis in axes))
        rotated[members] = turned.flip([2 + axis for axis in flips])
    return rotated, upload(chosen, crops.device)

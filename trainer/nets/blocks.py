"""Split cubes into equal blocks, and join them again."""

from __future__ import annotations

from torch import Tensor


def split_blocks(x: Tensor, blocks: int) -> Tensor:
    """(n, c, Z, Y, X) -> (n * blocks^3, c, Z / blocks, ...), blocks of a cube in z-y-x order."""
    if blocks == 1:
        return x
    n, c, *sides = x.shape
    z, y, x_ = (side // blocks for side in sides)
    cut = x.reshape(n, c, blocks, z, blocks, y, blocks, x_)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n * blocks**3, c, z, y, x_)


def join_blocks(x: Tensor, blocks: int) -> Tensor:
    """Undo `split_blocks`."""
    if blocks == 1:
        return x
    n, c, z, y, x_ = len(x) // blocks**3, *x.shape[1:]
    cut = x.reshape(n, blocks, blocks, blocks, c, z, y, x_)
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(n, c, blocks * z, blocks * y, blocks * x_)

"""Split crops into equal sub-cubes, and join them again."""

from __future__ import annotations

from torch import Tensor


def split_subcubes(x: Tensor, parts: int) -> Tensor:
    """(n, c, Z, Y, X) -> (n * parts^3, c, Z / parts, ...): the sub-cubes of a crop in z-y-x order.

    parts
        Sub-cubes along each axis.
    """
    if parts == 1:
        return x
    n, c, *sides = x.shape
    z, y, x_ = (side // parts for side in sides)
    cut = x.reshape(n, c, parts, z, parts, y, parts, x_)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n * parts**3, c, z, y, x_)


def join_subcubes(x: Tensor, parts: int) -> Tensor:
    """Undo `split_subcubes`."""
    if parts == 1:
        return x
    n, c, z, y, x_ = len(x) // parts**3, *x.shape[1:]
    cut = x.reshape(n, parts, parts, parts, c, z, y, x_)
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(n, c, parts * z, parts * y, parts * x_)

"""HU of padding and air, the mean and deviation of a scan's HU, and scan ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

PADDING_HU: Final = -2000
"""HU at and below which a voxel is padding outside the field of view, and counts as air."""
AIR_HU: Final = -1000


def mean_and_std(values: NDArray[Any]) -> tuple[float, float]:
    """Mean and standard deviation of all voxels of a scan (Z, Y, X); int16 HU, or other values.

    For whole numbers within int16 the result is exact, so it is the same on every machine.
    """
    # plane by plane in the order of memory, which fits the processor's cache
    upright = values[tuple(slice(None, None, -1 if step < 0 else 1) for step in values.strides)]
    number = int if np.issubdtype(values.dtype, np.integer) else float
    total: float = number(0)
    squares: float = number(0)
    for plane in np.moveaxis(upright, int(np.argmax(upright.strides)), 0):
        line = np.ravel(plane, order="K").astype(np.float64)  # whole numbers: sums below 2^53
        total += number(line.sum())
        squares += number(line @ line)
    variance = max(squares * values.size - total * total, 0) / values.size**2
    return total / values.size, math.sqrt(variance)


def scan_id(hu: NDArray[np.int16], spacing_mm: Sequence[float]) -> int:
    """The id of a scan: 64 bits from its voxels and geometry, never from a header or a path.

    hu
        (Z, Y, X) int16, in LPS orientation, padding replaced by air.
    spacing_mm
        (z, y, x).
    """
    geometry = f"{hu.shape} {[round(s, 4) for s in spacing_mm]}"
    digest = blake3(geometry.encode())
    for slice_yx in hu:
        digest.update(np.ascontiguousarray(slice_yx).view(np.uint8).data)
    return int.from_bytes(digest.digest(length=8), "big")


def scan_name(scan_id: int | np.integer[Any]) -> str:
    """A scan id as it is shown: 16 hex digits."""
    return f"{int(scan_id):016x}"

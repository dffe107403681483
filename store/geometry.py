"""HU of padding and air, and scan ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

PADDING_HU: Final = -2000
"""HU at and below which a voxel is padding outside the field of view, and counts as air."""
AIR_HU: Final = -1000


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

"""A scan's pseudonym: from its voxels and geometry alone, never from a header or a path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

PADDING_HU: Final = -2000
"""Values at or below are padding outside the field of view, and count as air."""
AIR_HU: Final = -1000


def scan_id(hu: NDArray[np.int16], spacing_mm: Sequence[float]) -> int:
    """64 bits.

    hu
        (Z, Y, X) int16, turned to LPS, padding made air.
    spacing_mm
        (z, y, x).
    """
    geometry = f"{hu.shape} {[round(s, 4) for s in spacing_mm]}"
    digest = blake3(geometry.encode())
    for slice_yx in hu:
        digest.update(np.ascontiguousarray(slice_yx).view(np.uint8).data)
    return int.from_bytes(digest.digest(length=8), "big")


def scan_name(identity: int | np.integer[Any]) -> str:
    """A pseudonym as it is shown: 16 hex digits."""
    return f"{int(identity):016x}"

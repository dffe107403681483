"""A guess of a scan's body region from its thumbnail, for the colours of the map of scans."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_LUNG_GREY: Final = (7, 64)
"""Grey levels of a thumbnail between -945 and -500 HU: air spaces of the lung."""
_LUNG_SHARE: Final = 0.1
"""Share of such voxels in the middle of a slice from which the slice is of the chest. The middle
leaves out the skin, where a voxel is half air."""
_NARROW_MM: Final = 200.0
"""A narrower frame, without lung in most slices, is of a limb or a head."""


def estimate_region(thumbnail: NDArray[np.uint8], frame_mm: NDArray[np.float64]) -> str:
    """The region in words.

    thumbnail
        (Z, Y, X) grey levels of the frame box, -1000 to 1000 HU mapped to 0 to 255.
    frame_mm
        (2, 3) low and high corner of the frame box in mm (z, y, x).
    """
    _, height, width = thumbnail.shape
    middle = thumbnail[:, height // 5 : -(height // 5), width // 5 : -(width // 5)]
    low, high = _LUNG_GREY
    lung = ((middle >= low) & (middle <= high)).mean((1, 2))
    chest = float((lung > _LUNG_SHARE).mean())
    _, tall_mm, wide_mm = frame_mm[1] - frame_mm[0]
    if chest >= 0.6:
        return "chest"
    if max(tall_mm, wide_mm) < _NARROW_MM:
        return "limb or head"
    return "chest and abdomen" if chest >= 0.15 else "abdomen or pelvis"

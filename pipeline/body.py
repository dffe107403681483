"""Which voxels of a scan are the patient's body, and which are table, blankets or air outside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_SOLID_HU, _AIR_HU = -300, -950
_WALL_MM = 5.0
"""Half the thickness up to which something solid counts as a thin wall, such as a table's."""
_KEPT_SHARE = 0.02
"""Solid parts smaller than this share of the largest one are not of the body."""

Mask = NDArray[np.bool_]


def body_mask(hu: NDArray[np.floating], spacing_mm: Sequence[float] | NDArray[np.float64]) -> Mask:
    """Mask (Z, Y, X) of the body, air that it encloses included.

    hu, spacing_mm
        (Z, Y, X) HU of a scan at low resolution, and (z, y, x) spacing of its voxels.

    Slice by slice, because lungs may be open along z. The core of the body is what is solid,
    without thin walls. A gap between solid voxels belongs to the body if most of its border is the
    core, such as a lung or a bowel; the inside of a table does not. A gap with air at the edge of
    the slice is outside.
    """
    solid = hu > _SOLID_HU
    core = _core(solid, spacing_mm)
    gaps, count = ndimage.label(~solid, structure=_IN_PLANE)
    border, at_core = (np.zeros(count + 1, int) for _ in range(2))
    outside = np.zeros(count + 1, bool)
    for axis in (1, 2):
        for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[1:], np.s_[:-1])):
            one, other = ((slice(None),) * axis + (part,) for part in (here, there))
            border += np.bincount(gaps[one][solid[other]], minlength=count + 1)
            at_core += np.bincount(gaps[one][core[other]], minlength=count + 1)
        for end in (0, -1):
            at_edge = np.take(gaps, end, axis)
            outside[at_edge[np.take(hu, end, axis) < _AIR_HU]] = True
    inside = (2 * at_core > border) & ~outside
    inside[0] = False  # what is solid
    return fill_holes(core | inside[gaps])


def _core(solid: Mask, spacing_mm: Sequence[float] | NDArray[np.float64]) -> Mask:
    """The large parts of what is solid, without thin walls."""
    y, x = (max(1, round(_WALL_MM / step)) for step in spacing_mm[1:])
    opened: Mask = ndimage.binary_opening(solid, structure=_disc(y, x)[None])
    return keep_large_parts(opened, _KEPT_SHARE)


def keep_large_parts(mask: Mask, share: float) -> Mask:
    """The connected parts of at least this share of the largest one: two legs are two parts."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(sizes >= share * sizes.max())[labels]


def fill_holes(mask: Mask) -> Mask:
    """Fill what the mask surrounds within a slice: lungs may be open along z."""
    return ndimage.binary_fill_holes(mask, structure=_IN_PLANE)


def _disc(reach_y: int, reach_x: int) -> Mask:
    y, x = np.ogrid[-reach_y : reach_y + 1, -reach_x : reach_x + 1]
    return np.asarray((y / (reach_y + 0.5)) ** 2 + (x / (reach_x + 0.5)) ** 2 <= 1)


_IN_PLANE = np.zeros((3, 3, 3), bool)
"""Connectivity within a slice only."""
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)

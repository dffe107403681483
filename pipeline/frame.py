"""The box that a class's coordinate is a fraction of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.volume import Volume

_GRID_MM = 4.0
_BODY_HU = -300
_OPENING_MM = 10.0
_KEPT_SHARE = 0.1
_EDGE_SHARE = 0.02


def frame_box(volume: Volume, frame: str) -> NDArray[np.float64]:
    """(2, 3) low and high corner in mm of the scan's frame box, at voxel edges.

    `body`: the body's extent in y and x (table, blankets and air left out), the scan's in z.
    `scan` and `voxel`: the whole scan. Where no body is found, `body` is the whole scan too.
    """
    box = volume.edges_mm
    if frame != "body":
        return box
    mask, step = _body_mask(volume)
    if not mask.any():
        return box
    for axis, others in ((1, (0, 2)), (2, (0, 1))):
        profile = mask.sum(axis=others)
        inside = np.flatnonzero(profile > _EDGE_SHARE * profile.max())
        spacing = volume.spacing_mm[axis]
        low = (inside[0] * step[axis] - 0.5) * spacing
        high = ((inside[-1] + 1) * step[axis] - 0.5) * spacing
        box[:, axis] = max(box[0, axis], low), min(box[1, axis], high)
    return box


def _body_mask(volume: Volume) -> tuple[NDArray[np.bool_], tuple[int, ...]]:
    """The body on a coarse grid, and that grid's step in voxels."""
    step = tuple(max(1, round(_GRID_MM / s)) for s in volume.spacing_mm)
    coarse = volume.hu[:: step[0], :: step[1], :: step[2]]
    mask = coarse > _BODY_HU
    # An opening per slice, wider than a table top is thick, cuts the table off.
    grid_mm = 0.5 * (step[1] * volume.spacing_mm[1] + step[2] * volume.spacing_mm[2])
    radius = max(1, round(_OPENING_MM / grid_mm))
    disc = _disc(radius)[None]
    solid = ndimage.binary_fill_holes(mask, structure=_in_plane())
    opened = ndimage.binary_opening(solid, structure=disc)
    labels, count = ndimage.label(opened)
    if count == 0:
        return opened, step
    sizes = np.bincount(labels.ravel())[1:]
    kept = 1 + np.flatnonzero(sizes >= _KEPT_SHARE * sizes.max())  # two legs are two components
    return np.isin(labels, kept), step


def _disc(radius: int) -> NDArray[np.bool_]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc: NDArray[np.bool_] = y * y + x * x <= radius * radius
    return disc


def _in_plane() -> NDArray[np.bool_]:
    """Connectivity within a slice only, so that lungs open at the scan's ends are filled too."""
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = ndimage.generate_binary_structure(2, 1)
    return structure

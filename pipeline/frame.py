"""The box that a class's coordinate is a fraction of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.volume import Volume

_GRID_MM = (12.0, 4.0, 4.0)
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
    coarse = volume.thin(_GRID_MM)
    mask = _body_mask(coarse)
    if not mask.any():
        return box
    for axis, others in ((1, (0, 2)), (2, (0, 1))):
        profile = mask.sum(axis=others)
        inside = np.flatnonzero(profile > _EDGE_SHARE * profile.max())
        low, high = np.array([inside[0], inside[-1] + 1]) * coarse.spacing_mm[axis] + box[0, axis]
        box[:, axis] = low, min(box[1, axis], high)
    return box


def _body_mask(coarse: Volume) -> NDArray[np.bool_]:
    """The voxels of the body."""
    # An opening per slice, wider than a table top is thick, cuts the table off.
    radius = max(1, round(_OPENING_MM / (0.5 * (coarse.spacing_mm[1] + coarse.spacing_mm[2]))))
    opened = ndimage.binary_opening(
        _fill_holes(coarse.hu > _BODY_HU), structure=_disc(radius)[None]
    )
    labels, count = ndimage.label(opened)
    if count == 0:
        return opened
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(sizes >= _KEPT_SHARE * sizes.max())[labels]  # two legs are two components


def _fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill what does not reach a slice's edge: lungs are open at the scan's ends, not in-plane."""
    labels, count = ndimage.label(~mask, structure=_in_plane())
    outside = np.zeros(count + 1, bool)
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        outside[edge] = True
    outside[0] = False
    return ~outside[labels]


def _disc(radius: int) -> NDArray[np.bool_]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc: NDArray[np.bool_] = y * y + x * x <= radius * radius
    return disc


def _in_plane() -> NDArray[np.bool_]:
    """Connectivity within a slice only."""
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = ndimage.generate_binary_structure(2, 1)
    return structure

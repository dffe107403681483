"""The frame box of a scan: a class's coordinate is a fraction of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.archive.volume import Volume
from pipeline.body import fill_holes, keep_large_parts
from pipeline.config import Frame

_GRID_MM = (12.0, 4.0, 4.0)
_BODY_HU = -300
_OPENING_MM = 10.0
_KEPT_SHARE = 0.1
_EDGE_SHARE = 0.02


def frame_box(volume: Volume, frame: Frame) -> NDArray[np.float64]:
    """(2, 3) low and high corner in mm of the scan's frame box, at voxel edges.

    `body`: the body's extent in y and x (without table, blankets and air), the scan's in z.
    `scan` and `voxel`: the scan; also `body` where no body is found.
    """
    box = volume.edges_mm
    if frame != "body":
        return box
    coarse = volume.thin(_GRID_MM)
    mask = _trunk_mask(coarse)
    if not mask.any():
        return box
    for axis in (1, 2):
        box[:, axis] = _edges_mm(volume, coarse, mask, axis)
    return box


def _edges_mm(
    volume: Volume, coarse: Volume, mask: NDArray[np.bool_], axis: int
) -> tuple[float, float]:
    """Start and end of the body along an axis, in mm: on the coarse grid, then to the voxel.

    mask
        (Z, Y, X) of `coarse`.
    """
    steps = [round(c / s) for c, s in zip(coarse.spacing_mm, volume.spacing_mm, strict=True)]
    step, steps[axis] = steps[axis], 1
    fine = np.moveaxis(volume.hu[tuple(slice(None, None, s) for s in steps)], axis, 0)
    rows = np.moveaxis(mask, axis, 0)
    width = rows.sum(axis=(1, 2))
    least = _EDGE_SHARE * width.max()
    inside = np.flatnonzero(width > least)
    first, last = int(inside[0]) * step, int(inside[-1]) * step
    first -= _reach(fine[max(0, first - step) : first][::-1], rows[inside[0]], step, least)
    last += _reach(fine[last + 1 : last + 1 + step], rows[inside[-1]], step, least)
    spacing = volume.spacing_mm[axis]
    return (first - 0.5) * spacing, (last + 0.5) * spacing


def _reach(beyond: NDArray[np.int16], columns: NDArray[np.bool_], step: int, least: float) -> int:
    """Number of voxels by which the body extends past its outermost coarse row.

    beyond
        (rows, n, m) HU of the rows from there outwards, up to the next coarse row.
    columns
        (n, m) of the body in its outermost coarse row.
    step
        Rows of a coarse row.
    least
        Voxels of the body that a row needs.
    """
    solid = np.logical_and.accumulate(beyond[:, columns] > _BODY_HU, axis=0)
    if len(solid) == step:  # what reaches the next coarse row was removed by the opening
        solid &= ~solid[-1]
    return int(np.count_nonzero(solid.sum(axis=1) > least))


def _trunk_mask(coarse: Volume) -> NDArray[np.bool_]:
    """Mask (Z, Y, X) of the body without the table."""
    # An opening per slice, wider than a table top is thick, cuts the table off.
    radius = max(1, round(_OPENING_MM / (0.5 * (coarse.spacing_mm[1] + coarse.spacing_mm[2]))))
    opened = ndimage.binary_opening(fill_holes(coarse.hu > _BODY_HU), structure=_disc(radius)[None])
    return keep_large_parts(opened, _KEPT_SHARE)


def _disc(radius: int) -> NDArray[np.bool_]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc: NDArray[np.bool_] = y * y + x * x <= radius * radius
    return disc

"""One interpolation: from the scanner's own voxels to a crop's grid, axis by axis.

Linear interpolation is separable, and so is a Gaussian; each axis becomes one small matrix
that does both, and a crop is three matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from pipeline.volume import Volume

_TRUNCATE_SIGMAS = 3.0


class CropOutsideVolume(ValueError):
    """A crop that would need voxels which the scan does not have."""


def axis_weights(
    *, num_voxels: int, spacing_mm: float, first_mm: float, step_mm: float, num_samples: int
) -> tuple[int, NDArray[np.float32]]:
    """Interpolation of evenly spaced samples along one axis, as a matrix.

    first_mm
        Position of the first sample; voxel 0 is at 0. Samples outside the voxels' centres take
        the edge's value.

    Returns the first voxel needed and (num_samples, voxels) float32 weights; rows sum to 1.
    Linear. Where the step is coarser than the spacing, a Gaussian comes first whose variance is
    the difference of two, with sigma half the step and half the spacing: it vanishes as the
    two grids meet.
    """
    index = (first_mm + step_mm * np.arange(num_samples)) / spacing_mm
    index = np.clip(index, 0, num_voxels - 1)
    sigma = 0.5 * np.sqrt(max(0.0, (step_mm / spacing_mm) ** 2 - 1))  # in voxels
    reach = int(np.ceil(_TRUNCATE_SIGMAS * sigma))
    low = max(0, int(np.floor(index[0])) - reach)
    high = min(num_voxels - 1, int(np.floor(index[-1])) + 1 + reach)
    voxel = np.arange(low, high + 1)
    # linear weights to the voxels around, widened so that the Gaussian has its neighbours
    wide = np.arange(low - reach, high + reach + 1)
    weights = np.maximum(0, 1 - np.abs(index[:, None] - wide))
    if reach:
        offset = wide[:, None] - voxel
        kernel = np.exp(-0.5 * (offset / sigma) ** 2) * (np.abs(offset) <= reach)
        weights = weights @ kernel
    else:
        weights = weights[:, : len(voxel)]
    weights /= weights.sum(axis=1, keepdims=True)
    return low, weights.astype(np.float32)


def resample(
    volume: Volume, *, origin_mm: Sequence[float], extent_mm: Sequence[float], shape: Sequence[int]
) -> NDArray[np.float32]:
    """Interpolate a box of the scan onto a grid of the given (Z, Y, X) shape.

    origin_mm, extent_mm
        First corner (edge, not voxel centre) and size of the box, (z, y, x) in mm.

    Returns (Z, Y, X) float32 HU, not clipped. Beyond the scan, its edge is repeated.
    """
    axes = [
        axis_weights(
            num_voxels=volume.hu.shape[axis],
            spacing_mm=volume.spacing_mm[axis],
            first_mm=origin_mm[axis] + 0.5 * extent_mm[axis] / shape[axis],
            step_mm=extent_mm[axis] / shape[axis],
            num_samples=shape[axis],
        )
        for axis in range(3)
    ]
    (z_low, z_weights), (y_low, y_weights), (x_low, x_weights) = axes
    out_zyx = np.zeros(tuple(shape), np.float32)
    # a slice at a time: no float copy of more than one slice is ever held
    for offset, column in enumerate(z_weights.T):
        used = np.flatnonzero(column)
        if len(used) == 0:
            continue
        slice_yx = volume.hu[
            z_low + offset,
            y_low : y_low + y_weights.shape[1],
            x_low : x_low + x_weights.shape[1],
        ].astype(np.float32)
        out_zyx[used] += column[used, None, None] * ((y_weights @ slice_yx) @ x_weights.T)
    return out_zyx


def cut_crop(
    volume: Volume,
    *,
    origin_mm: Sequence[float],
    extent_mm: Sequence[float],
    shape: Sequence[int],
    window_hu: tuple[int, int],
) -> NDArray[np.int16]:
    """One crop, straight from the scanner's voxels: (Z, Y, X) int16 HU, clipped to the window.

    Raises CropOutsideVolume when a sample lies beyond the outermost voxels' centres: nothing is
    padded silently.
    """
    for axis, name in enumerate("zyx"):
        step = extent_mm[axis] / shape[axis]
        first, last = origin_mm[axis] + 0.5 * step, origin_mm[axis] + extent_mm[axis] - 0.5 * step
        limit = (volume.hu.shape[axis] - 1) * volume.spacing_mm[axis]
        if first < -1e-6 or last > limit + 1e-6:
            raise CropOutsideVolume(
                f"crop spans {first:.2f} to {last:.2f} mm along {name}, the scan 0 to {limit:.2f}"
            )
    values = resample(volume, origin_mm=origin_mm, extent_mm=extent_mm, shape=shape)
    return np.asarray(np.rint(np.clip(values, *window_hu)), np.int16)


def make_thumbnail(
    volume: Volume, frame_mm: NDArray[np.float64], shape: Sequence[int], config: PrepareConfig
) -> NDArray[np.uint8]:
    """The frame box at low resolution: uint8, the window mapped to 0..255."""
    low, high = config.window_hu
    values = resample(
        volume, origin_mm=frame_mm[0], extent_mm=frame_mm[1] - frame_mm[0], shape=shape
    )
    scaled = np.clip((values - low) * (255 / (high - low)), 0, 255)
    return np.asarray(np.rint(scaled), np.uint8)

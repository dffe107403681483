"""Interpolate once, from the scanner's own voxels to a crop's grid, axis by axis.

Linear interpolation is separable, and so is a Gaussian; one small matrix for each axis does both,
and a crop is three matrix products.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from pipeline.archive.volume import Volume
from pipeline.config import PrepareConfig

_TRUNCATE_SIGMAS = 3.0
_VOXELS_PER_STEP = 1.5
"""Voxels read along each axis for one voxel of a thumbnail, about."""
_VOXELS_PER_BLOCK = 32
"""Voxels along an axis for one matrix product, about; with fewer, calls cost more than zeros."""


class CropOutsideVolume(ValueError):
    """A crop that extends beyond the scan."""


def one_blas_thread() -> AbstractContextManager[object]:
    """Interpolate within this context, so that the same scan gives the same bytes everywhere.

    With several threads, BLAS adds in another order, which can change the last bit of a voxel.
    """
    context: AbstractContextManager[object] = _threadpools().limit(limits=1, user_api="blas")
    return context


@cache
def _threadpools() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries, which takes a millisecond


def axis_weights(
    *, num_voxels: int, spacing_mm: float, first_mm: float, step_mm: float, num_samples: int
) -> tuple[int, NDArray[np.float32]]:
    """Interpolation of evenly spaced samples along one axis, as a matrix.

    first_mm
        Position of the first sample; voxel 0 is at 0. Samples beyond the first or last voxel's
        centre get its value.

    Returns the first voxel needed and (num_samples, voxels) float32 weights; rows sum to 1.
    Linear. Where the step is coarser than the spacing, a Gaussian is applied first. Its variance
    is that of a Gaussian with sigma half the step minus that with sigma half the spacing, so it
    vanishes where the two are equal.
    """
    index = (first_mm + step_mm * np.arange(num_samples)) / spacing_mm
    index = np.minimum(np.maximum(index, 0), num_voxels - 1)
    before = index.astype(np.intp)
    kernel, change = _kernel(step_mm / spacing_mm)
    reach = len(kernel) // 2 - 1
    start, stop = int(before[0]) - reach, int(before[-1]) + reach + 2
    # Of each sample, the weights of the voxels from `before - reach` to `before + reach + 1`.
    near = kernel + (index - before)[:, None] * change
    column = before[:, None] + np.arange(-reach - start, reach + 2 - start)
    low, high = max(0, start), min(num_voxels, stop)
    if (low, high) != (start, stop):  # the scan ends within reach
        near[(column < low - start) | (column >= high - start)] = 0
    if reach:  # without smoothing, the sum is 1 already
        near /= near.sum(axis=1, keepdims=True)
    weights = np.zeros((num_samples, stop - start), np.float32)
    weights[np.arange(num_samples)[:, None], column] = near
    return low, weights[:, low - start : high - start]


@lru_cache(maxsize=256)
def _kernel(step: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smoothing before interpolation, for samples `step` voxels apart.

    Returns the weights of the voxels from `-reach` to `reach + 1` around a sample on a voxel, not
    normalised, and how they change until the sample is on the next voxel.
    """
    sigma = 0.5 * np.sqrt(max(0.0, step**2 - 1))
    reach = int(np.ceil(_TRUNCATE_SIGMAS * sigma))
    kernel = np.zeros(2 * reach + 2)
    kernel[:-1] = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2) if reach else 1.0
    return kernel, np.roll(kernel, 1) - kernel


def resample(
    volume: Volume, *, origin_mm: Sequence[float], extent_mm: Sequence[float], shape: Sequence[int]
) -> NDArray[np.float32]:
    """Interpolate a box of the scan onto a grid of the given (Z, Y, X) shape.

    origin_mm, extent_mm
        First corner (edge, not voxel centre) and size of the box, (z, y, x) in mm.

    Returns (Z, Y, X) float32 HU, not clipped. Beyond the scan, the edge voxel is repeated.
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
    values = volume.hu[
        z_low : z_low + z_weights.shape[1],
        y_low : y_low + y_weights.shape[1],
        x_low : x_low + x_weights.shape[1],
    ].astype(np.float32, order="C")
    # first the axis that shrinks most, so that less is left to compute
    for axis in sorted(range(3), key=lambda axis: shape[axis] / values.shape[axis]):
        values = _apply(axes[axis][1], values, axis)
    return values


def _apply(
    weights: NDArray[np.float32], values: NDArray[np.float32], axis: int
) -> NDArray[np.float32]:
    """Multiply one axis of a (Z, Y, X) array by a matrix of `axis_weights`.

    In blocks of samples, each with the voxels it needs: a sample needs few, so most of a large
    matrix is zero.
    """
    num_samples, num_voxels = weights.shape
    z, y, x = values.shape
    out = np.empty([*values.shape[:axis], num_samples, *values.shape[axis + 1 :]], np.float32)
    num_blocks = max(1, num_voxels // _VOXELS_PER_BLOCK)
    ends = [num_samples * block // num_blocks for block in range(num_blocks + 1)]
    for start, stop in itertools.pairwise(ends):
        low = int((weights[start] != 0).argmax())
        high = num_voxels - int((weights[stop - 1, ::-1] != 0).argmax())
        block = weights[start:stop, low:high]
        if axis == 0:
            target = out[start:stop].reshape(-1, y * x)
            np.matmul(block, values[low:high].reshape(-1, y * x), out=target)
        elif axis == 1:
            np.matmul(block, values[:, low:high], out=out[:, start:stop])
        else:
            target = out.reshape(z * y, -1)[:, start:stop]
            np.matmul(values.reshape(z * y, x)[:, low:high], block.T, out=target)
    return out


def cut_crop(
    volume: Volume,
    *,
    origin_mm: Sequence[float],
    extent_mm: Sequence[float],
    shape: Sequence[int],
    window_hu: tuple[int, int],
) -> NDArray[np.int16]:
    """One crop, straight from the scanner's voxels: (Z, Y, X) int16 HU, clipped to the window.

    Raises CropOutsideVolume when a sample is beyond the outermost voxels' centres: nothing is
    padded.
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
    low, high = (min(max(bound, -32768), 32767) for bound in window_hu)
    crop = np.rint(values, out=values).astype(np.int16)
    return np.clip(crop, low, high, out=crop)


def make_thumbnail(
    volume: Volume, frame_mm: NDArray[np.float64], shape: Sequence[int], config: PrepareConfig
) -> NDArray[np.uint8]:
    """The frame box at low resolution: uint8 of the given shape, the window mapped to 0..255.

    Of a fine scan not every voxel is read; this leaves a little more noise.
    """
    low, high = config.window_hu
    extent_mm = frame_mm[1] - frame_mm[0]
    values = resample(
        volume.thin(extent_mm / shape / _VOXELS_PER_STEP),
        origin_mm=frame_mm[0],
        extent_mm=extent_mm,
        shape=shape,
    )
    scaled = np.clip((values - low) * (255 / (high - low)), 0, 255)
    return np.asarray(np.rint(scaled), np.uint8)

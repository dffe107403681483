"""What matching knows of a scan, computed from its thumbnail: see `pipeline.match`.

Beyond the scan along z, nothing is known. In-plane, beyond the frame box is air, if the scan shows
it. What is known is the product of one vector for each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.crops import axis_weights

Floats: TypeAlias = NDArray[np.float32]
Point: TypeAlias = NDArray[np.float64]
Known: TypeAlias = tuple[Floats, Floats, Floats]
"""1 where the scan shows an index along z, y and x, else 0."""

_HU: Final = (-1000, -850, -500, -150, -60, 20, 80, 200, 600, 1000)
_GREY: Final = (0, 0.12, 0.3, 0.42, 0.5, 0.66, 0.8, 0.9, 1.05, 1.1)
"""Grey values by HU, linear between. Soft tissue gets a large part of the range."""
_SLICE_MM, _CELLS, _SLICE_STD = 6.0, (16, 20), 0.02
_SIGMA_MM, _STD = 24.0, 0.03
_AIR_MARGIN_MM = 10.0
"""Where the frame box ends at least this far inside the scan, what is beyond it is air."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Features of a scan on an even grid; beyond the grid, nothing is known."""

    step_mm: float
    origin_mm: Point
    """Position of the first sample."""
    values: NDArray[np.float16]
    """(Z, Y, X) grey values, normalised by their surroundings; 0 where not known."""
    known: Known

    def around(self, place_mm: Point, reach_mm: Point) -> Grid:
        """The part of the grid within reach of a place along each axis."""
        index = (place_mm - self.origin_mm) / self.step_mm
        steps = np.ceil(np.divide(reach_mm, self.step_mm)) + 1
        size = self.values.shape
        low = np.clip(np.floor(index) - steps, 0, size).astype(int)
        high = np.clip(np.floor(index) + steps + 1, low, size).astype(int)
        z, y, x = part = [slice(a, b) for a, b in zip(low, high, strict=True)]
        known_z, known_y, known_x = (k[s] for k, s in zip(self.known, part, strict=True))
        return Grid(
            self.step_mm,
            self.origin_mm + low * self.step_mm,
            self.values[z, y, x].copy(),
            (known_z, known_y, known_x),
        )

    def sample(self, centre_mm: Point, radius: Sequence[int]) -> tuple[Floats, Known]:
        """Values at 2 radius + 1 steps along each axis around a point, linear between."""
        index = (centre_mm - self.origin_mm) / self.step_mm
        first = np.floor(index).astype(int)
        values = np.zeros([2 * reach + 2 for reach in radius], np.float32)
        source, target, known = [], [], []
        for axis, (start, reach) in enumerate(zip(first, radius, strict=True)):
            low = max(start - reach, 0)
            high = max(low, min(start + reach + 2, self.values.shape[axis]))
            source.append(slice(low, high))
            target.append(slice(low - start + reach, high - start + reach))
            known.append(np.zeros(values.shape[axis], np.float32))
            known[axis][target[axis]] = self.known[axis][source[axis]]
        values[tuple(target)] = self.values[tuple(source)]
        for axis, share in enumerate((index - first).astype(np.float32)):
            before, after = (
                (slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None))
            )
            values = values[before] + share * (values[after] - values[before])
            line = known[axis]
            known[axis] = (line[:-1] + share * (line[1:] - line[:-1]) > 0.99).astype(np.float32)
        known_z, known_y, known_x = known
        return values * outer(known_z, known_y, known_x), (known_z, known_y, known_x)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """Grey values of the frame box, or of a part of it; beyond, nothing is known."""

    spacing_mm: Point
    origin_mm: Point
    """Position of the first voxel."""
    values: NDArray[np.uint8]
    """(Z, Y, X)."""

    def around(self, place_mm: Point, reach_mm: float) -> Thumbnail:
        """The part within reach of a place."""
        size = self.values.shape
        low, high = (
            (place_mm + side * reach_mm - self.origin_mm) / self.spacing_mm for side in (-1, 1)
        )
        low = np.clip(np.floor(low), 0, np.subtract(size, 2)).astype(int)
        high = np.clip(np.ceil(high) + 1, low + 2, size).astype(int)
        z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
        origin_mm = self.origin_mm + low * self.spacing_mm
        return Thumbnail(self.spacing_mm, origin_mm, self.values[z, y, x].copy())

    def sample(self, centre_mm: Point, offset_mm: Point) -> tuple[Floats, Known]:
        """Values at (n,) offsets along each axis around a point: (n, n, n), linear between."""
        part, weights, known = [], [], []
        for axis, size in enumerate(self.values.shape):
            at = (centre_mm[axis] + offset_mm - self.origin_mm[axis]) / self.spacing_mm[axis]
            known.append(((at >= -0.5) & (at <= size - 0.5)).astype(np.float32))
            at = np.clip(at, 0, size - 1)
            first = np.minimum(at.astype(int), size - 2)
            part.append(slice(first[0], first[-1] + 2))
            rows = np.arange(len(at))
            weight = np.zeros((len(at), first[-1] + 2 - first[0]), np.float32)
            weight[rows, first - first[0] + 1] = at - first
            weight[rows, first - first[0]] = 1 - (at - first)
            weights.append(weight)
        values = contract(self.values[tuple(part)].astype(np.float32), weights)
        known_z, known_y, known_x = known
        return values, (known_z, known_y, known_x)


@dataclass(frozen=True, slots=True)
class Features:
    """What matching knows of one scan."""

    box_mm: Point
    """(2, 3) low and high corner of the frame box."""
    slices: NDArray[np.float16]
    """(n, cells) description of each slice: its cells, with mean 0 and mean square 1."""
    grids: tuple[Grid, ...]
    """One for each local search."""
    thumbnail: Thumbnail


def describe(
    thumbnail: NDArray[np.uint8],
    *,
    box_mm: NDArray[np.float64],
    edges_mm: NDArray[np.float64],
    window_hu: tuple[float, float],
    grids: Sequence[tuple[float, int]],
) -> Features:
    """Compute the features of a scan from its thumbnail.

    thumbnail
        (Z, Y, X) uint8: the frame box, `window_hu` mapped to 0..255.
    box_mm, edges_mm
        (2, 3) low and high corner of the frame box, and of the scan, at voxel edges.
    grids
        Step in mm of each grid, and its margin in steps around the box along y and x.
    """
    low, high = window_hu
    hu = np.linspace(low, high, 256)
    table = np.interp(hu, _HU, _GREY).astype(np.float32)
    grey = table[thumbnail]
    spacing_mm = (box_mm[1] - box_mm[0]) / thumbnail.shape
    values = np.rint(table * (255 / _GREY[-1])).astype(np.uint8)[thumbnail]
    return Features(
        np.asarray(box_mm),
        _describe_slices(grey, box_mm),
        tuple(_make_grid(grey, box_mm, edges_mm, step, margin) for step, margin in grids),
        Thumbnail(spacing_mm, box_mm[0] + 0.5 * spacing_mm, values),
    )


def outer(z: Floats, y: Floats, x: Floats) -> Floats:
    """(Z, Y, X) products of three vectors."""
    return z[:, None, None] * (y[:, None] * x)


def contract(values: Floats, matrices: Sequence[Floats]) -> Floats:
    """(..., Z, Y, X) values times a matrix (..., new length, length) along each axis."""
    z, y, x = matrices
    *_, size_y, size_x = values.shape
    flat = z @ values.reshape(*values.shape[:-2], size_y * size_x)
    planes = y[..., None, :, :] @ flat.reshape(*flat.shape[:-1], size_y, size_x)
    result: Floats = planes @ np.swapaxes(x, -1, -2)[..., None, :, :]
    return result


def _describe_slices(grey: Floats, box_mm: Point) -> NDArray[np.float16]:
    """(n, cells): slices of 6 mm, averaged over cells in-plane, normalised."""
    num = max(2, round(float(box_mm[1, 0] - box_mm[0, 0]) / _SLICE_MM))
    shares = [area_weights(size, n) for size, n in zip(grey.shape, (num, *_CELLS), strict=True)]
    cells = contract(grey, shares).reshape(num, -1)
    cells = cells - cells.mean(axis=1, keepdims=True)
    return np.asarray(
        cells / np.sqrt(np.square(cells).mean(axis=1, keepdims=True) + _SLICE_STD**2), np.float16
    )


def area_weights(size: int, num: int) -> Floats:
    """(num, size) weights that average an axis over `num` equal parts."""
    edges = np.arange(num + 1) * size / num
    index = np.arange(size)
    weights = np.minimum(index + 1, edges[1:, None]) - np.maximum(index, edges[:-1, None])
    return np.asarray(np.clip(weights, 0, None) * (num / size), np.float32)


def _make_grid(grey: Floats, box_mm: Point, edges_mm: Point, step_mm: float, margin: int) -> Grid:
    """Grey values on an even grid over the frame box, and beyond it where air is known."""
    values, origin, known = grey, [], []
    for axis, pad in enumerate((0, margin, margin)):
        low, high = box_mm[:, axis]
        num = max(2, round((high - low) / step_mm))
        first = 0.5 * ((high - low) - (num - 1) * step_mm)
        spacing = (high - low) / grey.shape[axis]
        start, weights = axis_weights(
            num_voxels=grey.shape[axis],
            spacing_mm=spacing,
            first_mm=first - 0.5 * spacing,
            step_mm=step_mm,
            num_samples=num,
        )
        moved = np.moveaxis(values, axis, 0)[start : start + weights.shape[1]]
        values = np.moveaxis(np.tensordot(weights, moved, axes=1), 0, axis)
        origin.append(low + first - pad * step_mm)
        inside = low - edges_mm[0, axis], edges_mm[1, axis] - high
        beyond = [float(distance > _AIR_MARGIN_MM) for distance in inside]
        known.append(np.pad(np.ones(num, np.float32), pad, constant_values=beyond))
    values = np.pad(values, [(0, 0), (margin, margin), (margin, margin)])  # air is 0
    known_z, known_y, known_x = known
    whole = outer(known_z, known_y, known_x)
    sigma = _SIGMA_MM / step_mm
    share = outer(*(_smooth(line, sigma) for line in known)) + 1e-6
    mean = _smooth(values * whole, sigma) / share
    square = _smooth(values * values * whole, sigma) / share
    deviation = np.sqrt(np.maximum(square - mean * mean, 0) + _STD**2)
    feature = ((values - mean) / deviation * whole).astype(np.float16)
    return Grid(step_mm, np.array(origin), feature, (known_z, known_y, known_x))


def _smooth(values: NDArray[Any], sigma: float) -> Floats:
    smoothed: Floats = ndimage.gaussian_filter(values, sigma, mode="constant", truncate=3)
    return smoothed

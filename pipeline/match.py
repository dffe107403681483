"""Find the place of the same anatomy in another scan, from the thumbnails of both.

First the slice: a coarse description of each slice is compared with those of the other scan. Then
the place: local normalised cross-correlation on grids of 12, 8 and 5 mm, then least squares on the
thumbnails' grey values. Then the way back to the first scan, which shows whether the place can be
trusted. There is no training and no random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from pipeline.crops import axis_weights

Floats = NDArray[np.float32]
Point = NDArray[np.float64]

_HU: Final = (-1000, -850, -500, -150, -60, 20, 80, 200, 600, 1000)
_GREY: Final = (0, 0.12, 0.3, 0.42, 0.5, 0.66, 0.8, 0.9, 1.05, 1.1)
"""Grey values by HU, linear between. Soft tissue gets a large part of the range."""

MIN_SCORE: Final = 0.4
MAX_CYCLE_MM: Final = 10.0
"""Limits of a match that can be trusted."""

_SLICE_MM, _CELLS = 6.0, (16, 20)
_SLICE_STD, _SLICE_STEP_MM = 0.02, 3.0
_SLICE_SIGMA_MM, _SLICE_REACH_MM = 100.0, 300.0
_SECOND_SLICE_DROP, _SECOND_SLICE_MM = 0.15, 45.0
_MIN_OVERLAP = 0.5
_FEATURE_SIGMA_MM, _FEATURE_STD = 24.0, 0.03
_CUT_SIGMAS = 2.0
_AIR_MARGIN_MM = 10.0
"""Beyond the frame box is air where the box ends at least so far inside the scan."""


@dataclass(frozen=True, kw_only=True)
class _Search:
    """One local search: its grid, its windows, how far it goes, and what distance costs."""

    step_mm: float
    sigmas_mm: tuple[float, float]
    """Of its two windows."""
    reach_mm: tuple[float, float, float]
    penalty_mm: float
    """At this distance from the start, the score is 1 less."""

    @cached_property
    def radius(self) -> int:
        """How far the windows reach, in steps."""
        return int(_CUT_SIGMAS * max(self.sigmas_mm) / self.step_mm)

    @cached_property
    def reach(self) -> list[int]:
        """`reach_mm` in steps."""
        return [round(mm / self.step_mm) for mm in self.reach_mm]

    @cached_property
    def windows(self) -> Floats:
        """(2, Z, Y, X) weights."""
        return np.stack([_window(sigma, self.step_mm, self.radius) for sigma in self.sigmas_mm])


def _window(sigma_mm: float, step_mm: float, radius: int) -> Floats:
    """(Z, Y, X) Gaussian, cut at 2 sigma; `radius` steps to each side."""
    along = np.square(np.arange(-radius, radius + 1) * step_mm)
    square = along[:, None, None] + along[:, None] + along
    within = square <= (_CUT_SIGMAS * sigma_mm) ** 2
    return np.asarray(np.exp(-0.5 * square / sigma_mm**2) * within, np.float32)


_SEARCHES: Final = (
    _Search(step_mm=12, sigmas_mm=(30, 60), reach_mm=(72, 48, 48), penalty_mm=300),
    _Search(step_mm=8, sigmas_mm=(16, 36), reach_mm=(24, 24, 24), penalty_mm=150),
    _Search(step_mm=5, sigmas_mm=(12, 30), reach_mm=(15, 15, 15), penalty_mm=100),
)

_FIT_STEP_MM, _FIT_RADIUS = 3.0, 10
_FIT_WINDOW: Final = _window(16.0, _FIT_STEP_MM, _FIT_RADIUS)
_FIT_REACH_MM, _FIT_ROUNDS, _FIT_STD = 6.0, 3, 2.5


def _reaches() -> tuple[Point, ...]:
    """(3,) farthest that a way back may be from its start before each search, and before the fit.

    From farther away, it cannot end within MAX_CYCLE_MM.
    """
    reaches = [np.full(3, MAX_CYCLE_MM + _FIT_REACH_MM)]
    for search in reversed(_SEARCHES):
        reaches.insert(0, reaches[0] + search.reach_mm + search.step_mm)
    return tuple(reaches)


_BEYOND_MM: Final = _reaches()


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """Where the anatomy of a place in one scan lies in another scan."""

    place_mm: Point
    """(z, y, x) in mm in the other scan."""
    score: float
    """Mean normalised cross-correlation around the place, less the distance searched; at most 1."""
    cycle_mm: float
    """Distance from the start after going there and back; infinite where there is no way back."""
    inside: bool
    """Whether the place is inside the other scan along z."""

    def problem(
        self, *, min_score: float = MIN_SCORE, max_cycle_mm: float = MAX_CYCLE_MM
    ) -> str | None:
        """Why the place cannot be trusted; None where it can."""
        if not self.inside:
            return "outside the scan"
        if self.score < min_score:
            return "weak match"
        return "did not lead back" if self.cycle_mm > max_cycle_mm else None


@dataclass(frozen=True, slots=True)
class _Grid:
    """Features of a scan on an even grid; beyond the grid, nothing is known."""

    step_mm: float
    origin_mm: Point
    """Position of the first sample."""
    values: NDArray[np.float16]
    """(Z, Y, X) grey values, normalised by their surroundings; 0 where `known` is false."""
    known: NDArray[np.bool_]
    """(Y, X) whether the scan shows this, at every z of the grid."""

    def around(self, place_mm: Point, reach_mm: Point) -> _Grid:
        """The part of the grid within reach of a place along each axis."""
        index = (place_mm - self.origin_mm) / self.step_mm
        steps = np.ceil(np.divide(reach_mm, self.step_mm)) + 1
        size = self.values.shape
        low = np.clip(np.floor(index) - steps, 0, size).astype(int)
        high = np.clip(np.floor(index) + steps + 1, low, size).astype(int)
        z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
        origin_mm = self.origin_mm + low * self.step_mm
        return _Grid(self.step_mm, origin_mm, self.values[z, y, x].copy(), self.known[y, x].copy())


@dataclass(frozen=True, slots=True)
class _Thumbnail:
    """Grey values of the frame box, or of a part of it; beyond, nothing is known."""

    spacing_mm: Point
    origin_mm: Point
    """Position of the first voxel."""
    values: NDArray[np.uint8]
    """(Z, Y, X)."""

    def around(self, place_mm: Point, reach_mm: float) -> _Thumbnail:
        """The part within reach of a place."""
        size = self.values.shape
        low, high = (
            (place_mm + side * reach_mm - self.origin_mm) / self.spacing_mm for side in (-1, 1)
        )
        low = np.clip(np.floor(low), 0, np.subtract(size, 2)).astype(int)
        high = np.clip(np.ceil(high) + 1, low + 2, size).astype(int)
        z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
        origin_mm = self.origin_mm + low * self.spacing_mm
        return _Thumbnail(self.spacing_mm, origin_mm, self.values[z, y, x].copy())

    def sample(self, centre_mm: Point) -> tuple[Floats, Floats]:
        """Values and `known` on the grid of `_FIT_WINDOW` around a point, linear between."""
        steps_mm = _FIT_STEP_MM * np.arange(-_FIT_RADIUS, _FIT_RADIUS + 1)
        values: NDArray[Any] = self.values
        known = np.ones((), np.float32)
        for axis, size in enumerate(self.values.shape):
            at = (centre_mm[axis] + steps_mm - self.origin_mm[axis]) / self.spacing_mm[axis]
            known = known[..., None] * ((at >= -0.5) & (at <= size - 0.5)).astype(np.float32)
            at = np.clip(at, 0, size - 1)
            first = np.minimum(at.astype(int), size - 2)
            share = (at - first).astype(np.float32).reshape(-1, *[1] * (2 - axis))
            before, after = (
                np.take(values, i, axis).astype(np.float32) for i in (first, first + 1)
            )
            values = before + share * (after - before)
        return values, known


@dataclass(frozen=True, slots=True)
class Features:
    """What matching knows of one scan."""

    box_mm: Point
    """(2, 3) low and high corner of the frame box."""
    slices: NDArray[np.float16]
    """(n, cells) description of each slice: its cells, with mean 0 and mean square 1."""
    grids: tuple[_Grid, ...]
    """One for each local search."""
    thumbnail: _Thumbnail

    def around(self, place_mm: Sequence[float] | Point) -> Features:
        """What `match_place` needs of this scan for one place, there and back; about 0.5 MB.

        Where the match can be trusted, the result is the same as with the whole scan.
        """
        place, grids = np.asarray(place_mm, np.float64), []
        thumbnail = self.thumbnail.around(
            place, MAX_CYCLE_MM + 2 * _FIT_REACH_MM + _FIT_RADIUS * _FIT_STEP_MM
        )
        for search, grid, beyond_mm in zip(_SEARCHES, self.grids, _BEYOND_MM[:-1], strict=True):
            reach_mm = beyond_mm + search.reach_mm + search.radius * search.step_mm
            grids.append(grid.around(place, reach_mm))
        return Features(self.box_mm, self.slices, tuple(grids), thumbnail)


def describe_scan(
    thumbnail: NDArray[np.uint8],
    *,
    box_mm: NDArray[np.float64],
    edges_mm: NDArray[np.float64],
    window_hu: tuple[float, float],
) -> Features:
    """Compute the features of a scan from its thumbnail.

    thumbnail
        (Z, Y, X) uint8: the frame box, `window_hu` mapped to 0..255.
    box_mm, edges_mm
        (2, 3) low and high corner of the frame box, and of the scan, at voxel edges.
    """
    low, high = window_hu
    hu = np.linspace(low, high, 256)
    table = np.interp(hu, _HU, _GREY).astype(np.float32)
    grey = table[thumbnail]
    grids = tuple(_make_grid(grey, box_mm, edges_mm, search) for search in _SEARCHES)
    spacing_mm = (box_mm[1] - box_mm[0]) / thumbnail.shape
    values = np.rint(table * (255 / _GREY[-1])).astype(np.uint8)[thumbnail]
    small = _Thumbnail(spacing_mm, box_mm[0] + 0.5 * spacing_mm, values)
    return Features(np.asarray(box_mm), _describe_slices(grey, box_mm), grids, small)


def match_place(
    place_mm: Sequence[float] | Point,
    here: Features,
    there: Features,
    *,
    min_score: float = MIN_SCORE,
) -> Match | None:
    """Find in scan `there` the anatomy at a place in scan `here`; None where there is no overlap.

    place_mm
        (z, y, x) in mm.
    min_score
        Below this score, the way back is not searched, and `cycle_mm` is infinite.
    """
    start = np.asarray(place_mm, np.float64)
    forth = _find(start, here, there)
    if forth is None:
        return None
    found, score = forth[0].round(2), round(forth[1], 4)  # the last bits depend on the CPU
    back = _find(found, there, here, home_mm=start) if score >= min_score else None
    cycle_mm = np.inf if back is None else round(float(np.linalg.norm(back[0] - start)), 2)
    (low, *_), (high, *_) = there.box_mm  # along z, the frame box is the scan
    inside = bool(low <= found[0] <= high)
    return Match(place_mm=found, score=score, cycle_mm=cycle_mm, inside=inside)


def _find(
    place_mm: Point, here: Features, there: Features, home_mm: Point | None = None
) -> tuple[Point, float] | None:
    """The place and its score; None, too, where the search cannot end within reach of `home_mm`."""
    share = (place_mm - here.box_mm[0]) / (here.box_mm[1] - here.box_mm[0])
    start = there.box_mm[0] + share * (there.box_mm[1] - there.box_mm[0])
    starts = [np.array([z, *start[1:]]) for z in _find_slices(place_mm[0], here, there)]
    score = 0.0
    for number, search in enumerate(_SEARCHES):
        if home_mm is not None:
            apart = np.abs(np.array(starts).reshape(-1, 3) - home_mm)
            if not (apart <= _BEYOND_MM[number]).all(axis=1).any():
                return None
        one, other = here.grids[number], there.grids[number]
        results = [_search(search, one, place_mm, other, start) for start in starts]
        found = max((r for r in results if r is not None), key=lambda r: r[1], default=None)
        if found is None:
            return None
        starts, score = [found[0]], found[1]
    return _fit(here.thumbnail, place_mm, there.thumbnail, starts[0]), score


# The slice


def _describe_slices(grey: Floats, box_mm: Point) -> NDArray[np.float16]:
    """(n, cells): slices of 6 mm, averaged over cells in-plane, normalised."""
    depth_mm = float(box_mm[1, 0] - box_mm[0, 0])
    num = max(2, round(depth_mm / _SLICE_MM))
    means = grey
    for axis, length in enumerate((num, *_CELLS)):
        means = _average(means, axis, length)
    cells = means.reshape(num, -1)
    cells = cells - cells.mean(axis=1, keepdims=True)
    return np.asarray(
        cells / np.sqrt(np.square(cells).mean(axis=1, keepdims=True) + _SLICE_STD**2), np.float16
    )


def _average(values: Floats, axis: int, length: int) -> Floats:
    """Values averaged to `length` equal parts of an axis."""
    moved = np.moveaxis(values, axis, 0)
    size = len(moved)
    edges = np.arange(length + 1) * size / length
    index = np.arange(size)
    weights = np.minimum(index + 1, edges[1:, None]) - np.maximum(index, edges[:-1, None])
    weights = np.clip(weights, 0, None) * (length / size)
    averaged = np.tensordot(weights.astype(np.float32), moved, axes=1)
    return np.asarray(np.moveaxis(averaged, 0, axis))


def _find_slices(z_mm: float, here: Features, there: Features) -> list[float]:
    """Heights (z) of the slices that look most alike, together with those around them; best first.

    None where too little overlaps, else one or two: the second is nearly as good and farther away
    than a local search reaches.
    """
    (low_a, high_a), (low_b, high_b) = here.box_mm[:, 0], there.box_mm[:, 0]
    offset = np.arange(-_SLICE_REACH_MM, _SLICE_REACH_MM + 1, _SLICE_MM)
    offset = offset[(z_mm + offset >= low_a) & (z_mm + offset <= high_a)]
    if not len(offset):
        return []
    weight = np.exp(-0.5 * (offset / _SLICE_SIGMA_MM) ** 2)
    candidate = np.arange(low_b, high_b + 1e-6, _SLICE_STEP_MM)
    one, other = (
        _interpolate(features.slices, (z - features.box_mm[0, 0]) / np.ptp(features.box_mm[:, 0]))
        for features, z in ((here, z_mm + offset), (there, candidate))
    )
    alike = one @ other.T / one.shape[1]  # (offsets, candidates)
    column = np.arange(len(candidate))[:, None] + np.rint(offset / _SLICE_STEP_MM).astype(int)
    within = weight * ((column >= 0) & (column < len(candidate)))  # (candidates, offsets)
    sampled = alike[np.arange(len(offset)), np.clip(column, 0, len(candidate) - 1)]
    total = within.sum(axis=1)
    score = (within * sampled).sum(axis=1) / np.maximum(total, 1e-9)
    score[total < _MIN_OVERLAP * weight.sum()] = -np.inf
    found: list[float] = []
    limit = score.max() - _SECOND_SLICE_DROP
    while len(found) < 2 and np.isfinite(score.max()) and score.max() >= limit:
        found.append(float(candidate[score.argmax()]))
        score[np.abs(candidate - found[-1]) < _SECOND_SLICE_MM] = -np.inf
    return found


def _interpolate(rows: NDArray[np.float16], share: Point) -> Floats:
    """Rows at shares of their common length, linear between."""
    index = np.clip(share * len(rows) - 0.5, 0, len(rows) - 1)
    first = np.minimum(index.astype(int), len(rows) - 2)
    rest = (index - first).astype(np.float32)[:, None]
    before, after = rows[first].astype(np.float32), rows[first + 1].astype(np.float32)
    return np.asarray(before + rest * (after - before), np.float32)


# The place


def _make_grid(grey: Floats, box_mm: Point, edges_mm: Point, search: _Search) -> _Grid:
    """Grey values on an even grid over the frame box, and beyond it where air is known."""
    step_mm, margin = search.step_mm, search.radius
    values, origin, pad, beyond = grey, [], [(0, 0), (margin, margin), (margin, margin)], []
    for axis in range(3):
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
        origin.append(low + first - pad[axis][0] * step_mm)
        inside = low - edges_mm[0, axis], edges_mm[1, axis] - high
        beyond.append(tuple(float(distance > _AIR_MARGIN_MM) for distance in inside))
    known = np.pad(np.ones(values.shape, np.float32), pad, constant_values=beyond)
    values = np.pad(values, pad).astype(np.float32)  # air is 0
    sigma = _FEATURE_SIGMA_MM / step_mm
    share = np.maximum(_smooth(known, sigma), 1e-6)
    mean = _smooth(values * known, sigma) / share
    square = _smooth(values * values * known, sigma) / share
    deviation = np.sqrt(np.maximum(square - mean * mean, 0) + _FEATURE_STD**2)
    feature = (values - mean) / deviation * known
    return _Grid(step_mm, np.array(origin), feature.astype(np.float16), known[0] > 0)


def _smooth(values: Floats, sigma: float) -> Floats:
    smoothed: Floats = ndimage.gaussian_filter(values, sigma, mode="constant", truncate=3)
    return smoothed


def _sample(grid: _Grid, centre_mm: Point, radius: Sequence[int]) -> tuple[Floats, Floats]:
    """Values and `known` at 2 radius + 1 steps along each axis around a point, linear between."""
    index = (centre_mm - grid.origin_mm) / grid.step_mm
    first = np.floor(index).astype(int)
    size = [2 * reach + 2 for reach in radius]
    values, known = np.zeros(size, np.float32), np.zeros(size, np.float32)
    source, target = [], []
    for start, reach, num in zip(first, radius, grid.values.shape, strict=True):
        low, high = max(start - reach, 0), min(start + reach + 2, num)
        source.append(slice(low, max(low, high)))
        target.append(slice(low - start + reach, max(low, high) - start + reach))
    values[tuple(target)] = grid.values[tuple(source)]
    known[tuple(target)] = grid.known[tuple(source[1:])]
    for axis, share in enumerate((index - first).astype(np.float32)):
        one, other = slice(None, -1), slice(1, None)
        before, after = (slice(None),) * axis + (one,), (slice(None),) * axis + (other,)
        values = values[before] + share * (values[after] - values[before])
        known = known[before] + share * (known[after] - known[before])
    whole = (known > 0.99).astype(np.float32)
    return values * whole, whole


def _search(
    search: _Search, here: _Grid, place_mm: Point, there: _Grid, start_mm: Point
) -> tuple[Point, float] | None:
    """The best place around a start, and its score; None where too little is known."""
    template, known = _sample(here, place_mm, [search.radius] * 3)
    area, known_there = _sample(there, start_mm, [search.radius + r for r in search.reach])
    score = _correlate(template, search.windows * known, area, known_there)
    z, y, x = (np.square(np.arange(-r, r + 1) * search.step_mm) for r in search.reach)
    score -= (z[:, None, None] + y[:, None] + x) / search.penalty_mm**2
    best = np.unravel_index(int(score.argmax()), score.shape)
    if not np.isfinite(score[best]):
        return None
    offset = [
        (b - r + _peak(score, best, axis)) * search.step_mm
        for axis, (b, r) in enumerate(zip(best, search.reach, strict=True))
    ]
    return start_mm + np.array(offset), float(score[best])


def _correlate(template: Floats, weights: Floats, area: Floats, known: Floats) -> Floats:
    """Normalised cross-correlation at every offset, the mean over the weights (n, Z, Y, X).

    -inf where too little is known.
    """
    shape = [fft.next_fast_len(n, real=True) for n in area.shape]
    size = [n - m + 1 for n, m in zip(area.shape, template.shape, strict=True)]
    ones, values, squares = fft.rfftn(np.stack([known, area, area * area]), shape, axes=(1, 2, 3))
    parts = np.stack([weights, weights * template, weights * template * template], axis=1)
    products = np.conj(fft.rfftn(parts, shape, axes=(2, 3, 4)))[:, [0, 1, 2, 0, 0, 1]]
    products *= np.stack([ones, ones, ones, values, squares, values])
    for axis in (2, 3):  # only the offsets that are needed
        products = fft.ifft(products, axis=axis, overwrite_x=True)
        products = products[(slice(None),) * axis + (slice(size[axis - 2]),)]
    sums = fft.irfft(products, shape[2], axis=4)[..., : size[2]]
    n, a, aa, b, bb, ab = np.moveaxis(sums, 1, 0)
    n = np.maximum(n, 1e-6)
    variance = np.maximum(aa - a * a / n, 0) * np.maximum(bb - b * b / n, 0)
    correlation = (ab - a * b / n) / np.sqrt(variance + (1e-3 * n) ** 2)
    least = _MIN_OVERLAP * weights.sum(axis=(1, 2, 3), keepdims=True)
    return np.asarray(np.where(n >= least, correlation, -np.inf).mean(axis=0))


def _peak(score: Floats, best: Sequence[np.intp], axis: int) -> float:
    """Offset of the maximum from the best sample, by a parabola through its neighbours."""
    index = int(best[axis])
    if not 0 < index < score.shape[axis] - 1:
        return 0.0
    line = score[tuple(slice(None) if a == axis else b for a, b in enumerate(best))]
    before, middle, after = line[index - 1 : index + 2].tolist()
    curve = before - 2 * middle + after
    if not np.isfinite(curve) or curve >= 0:
        return 0.0
    return float(np.clip(0.5 * (before - after) / curve, -0.5, 0.5))


def _fit(here: _Thumbnail, place_mm: Point, there: _Thumbnail, start_mm: Point) -> Point:
    """The best place near a start, by least squares.

    Both surroundings get mean 0 and mean square 1. A shift along the mean of their gradients
    explains their difference. The sum of squares is least where the correlation is highest.
    """
    template, known = here.sample(place_mm)
    found = start_mm
    for _ in range(_FIT_ROUNDS):
        area, known_there = there.sample(found)
        weight = _FIT_WINDOW * known * known_there
        total = weight.sum()
        if total < _MIN_OVERLAP * _FIT_WINDOW.sum():
            return found
        weight /= total
        one, other = _normalise(template, weight), _normalise(area, weight)
        gradient = np.stack([g.ravel() for g in np.gradient(0.5 * (one + other), _FIT_STEP_MM)])
        weighted = (gradient * weight.ravel()).astype(np.float64)
        squares = weighted @ gradient.T + 1e-6 * np.eye(3)
        shift = np.linalg.solve(squares, weighted @ (one - other).ravel())
        found = np.clip(found + shift, start_mm - _FIT_REACH_MM, start_mm + _FIT_REACH_MM)
    return found


def _normalise(values: Floats, weight: Floats) -> Floats:
    """Mean 0 and mean square 1 with weights that sum to 1."""
    centred = values - (weight * values).sum()
    return np.asarray(centred / np.sqrt((weight * centred * centred).sum() + _FIT_STD**2))

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
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import fft

from pipeline.features import Features, Floats, Grid, Point, Thumbnail, contract, describe, outer

MIN_SCORE: Final = 0.4
MAX_CYCLE_MM: Final = 10.0
"""Limits of a match that can be trusted."""

_SLICE_MM, _SLICE_STEP_MM = 6.0, 3.0
_SLICE_SIGMA_MM, _SLICE_REACH_MM = 100.0, 300.0
_SECOND_SLICE_DROP, _SECOND_SLICE_MM = 0.15, 45.0
_MIN_OVERLAP = 0.5
_CUT_SIGMAS = 2.0


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
        """(2, 2 radius + 1) weights along any axis: a window is the product of three."""
        return np.stack([_window(sigma, self.step_mm, self.radius) for sigma in self.sigmas_mm])

    @cached_property
    def costs(self) -> Floats:
        """(Z, Y, X) what the distance of each offset costs."""
        z, y, x = (np.square(np.arange(-r, r + 1) * self.step_mm) for r in self.reach)
        return np.asarray((z[:, None, None] + y[:, None] + x) / self.penalty_mm**2, np.float32)


def _window(sigma_mm: float, step_mm: float, radius: int) -> Floats:
    """(2 radius + 1,) Gaussian, cut at 2 sigma."""
    along = np.square(np.arange(-radius, radius + 1) * step_mm)
    within = along <= (_CUT_SIGMAS * sigma_mm) ** 2
    return np.asarray(np.exp(-0.5 * along / sigma_mm**2) * within, np.float32)


_SEARCHES: Final = (
    _Search(step_mm=12, sigmas_mm=(30, 60), reach_mm=(72, 48, 48), penalty_mm=300),
    _Search(step_mm=8, sigmas_mm=(16, 36), reach_mm=(24, 24, 24), penalty_mm=150),
    _Search(step_mm=5, sigmas_mm=(12, 30), reach_mm=(15, 15, 15), penalty_mm=100),
)

_FIT_STEP_MM, _FIT_RADIUS = 3.0, 10
_FIT_OFFSET_MM: Final[Point] = _FIT_STEP_MM * np.arange(-_FIT_RADIUS, _FIT_RADIUS + 1.0)
_FIT_WINDOW: Final = outer(*[_window(16.0, _FIT_STEP_MM, _FIT_RADIUS)] * 3)
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

    def problem(self) -> str | None:
        """Why the place cannot be trusted; None where it can."""
        if not self.inside:
            return "outside the scan"
        if self.score < MIN_SCORE:
            return "weak match"
        return "did not lead back" if self.cycle_mm > MAX_CYCLE_MM else None


def describe_scan(
    thumbnail: NDArray[np.uint8],
    *,
    box_mm: NDArray[np.float64],
    edges_mm: NDArray[np.float64],
    window_hu: tuple[float, float],
) -> Features:
    """Compute what `match_place` needs of a scan; arguments as of `pipeline.features.describe`."""
    grids = [(search.step_mm, search.radius) for search in _SEARCHES]
    return describe(thumbnail, box_mm=box_mm, edges_mm=edges_mm, window_hu=window_hu, grids=grids)


def describe_place(features: Features, place_mm: Sequence[float] | Point) -> Features:
    """What `match_place` needs of a scan for one place in it, there and back; about 0.5 MB.

    Where the match can be trusted, the result is the same as with the whole scan.
    """
    place, grids = np.asarray(place_mm, np.float64), []
    thumbnail = features.thumbnail.around(
        place, MAX_CYCLE_MM + 2 * _FIT_REACH_MM + _FIT_RADIUS * _FIT_STEP_MM
    )
    for search, grid, beyond_mm in zip(_SEARCHES, features.grids, _BEYOND_MM[:-1], strict=True):
        reach_mm = beyond_mm + search.reach_mm + search.radius * search.step_mm
        grids.append(grid.around(place, reach_mm))
    return Features(features.box_mm, features.slices, tuple(grids), thumbnail)


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
        template = _Template(search, here.grids[number], place_mm)
        results = [template.find(there.grids[number], start) for start in starts]
        found = max((r for r in results if r is not None), key=lambda r: r[1], default=None)
        if found is None:
            return None
        starts, score = [found[0]], found[1]
    return _fit(here.thumbnail, place_mm, there.thumbnail, starts[0]), score


# The slice


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
    """`rows` (n, cells) at `share` (m,) of their number, 0 to 1, linear between: (m, cells)."""
    index = np.clip(share * len(rows) - 0.5, 0, len(rows) - 1)
    first = np.minimum(index.astype(int), len(rows) - 2)
    rest = (index - first).astype(np.float32)[:, None]
    before, after = rows[first].astype(np.float32), rows[first + 1].astype(np.float32)
    return np.asarray(before + rest * (after - before), np.float32)


# The place


class _Template:
    """The surroundings of a place, to be searched for in another scan."""

    def __init__(self, search: _Search, grid: Grid, place_mm: Point) -> None:
        self.search = search
        values, known = grid.sample(place_mm, [search.radius] * 3)
        self.weights = [search.windows * line for line in known]
        """(2, z), (2, y), (2, x): both windows, 0 where nothing is known."""
        self.least = _MIN_OVERLAP * np.prod([w.sum(axis=1) for w in self.weights], axis=0)
        windows = np.stack([outer(*axes) for axes in zip(*self.weights, strict=True)])
        self.products = np.stack([windows * values, windows * values * values])
        """(2, 2, z, y, x) windows times values and times squares."""
        self.shape = [
            fft.next_fast_len(2 * (search.radius + reach) + 1, real=True) for reach in search.reach
        ]
        self.spectrum = np.conj(fft.rfftn(self.products[0], self.shape, axes=(1, 2, 3)))

    def find(self, grid: Grid, start_mm: Point) -> tuple[Point, float] | None:
        """The best place around a start, and its score; None where too little is known."""
        search = self.search
        area, known = grid.sample(start_mm, [search.radius + r for r in search.reach])
        score = self.correlate(area, known) - search.costs
        best = np.unravel_index(int(score.argmax()), score.shape)
        if not np.isfinite(score[best]):
            return None
        offset = [
            (b - r + _peak(score, best, axis)) * search.step_mm
            for axis, (b, r) in enumerate(zip(best, search.reach, strict=True))
        ]
        return start_mm + np.array(offset), float(score[best])

    def correlate(self, area: Floats, known: Sequence[Floats]) -> Floats:
        """Normalised cross-correlation at every offset, the mean over both windows.

        area
            (Z, Y, X) values, 0 where not `known`. Result: (Z - z + 1, ...), -inf where too little
            is known.
        """
        # Windows, and what is known, are products over the axes: all sums but one are contractions.
        sides = [weights.shape[1] for weights in self.weights]
        shifted = [sliding_window_view(line, n) for line, n in zip(known, sides, strict=True)]
        windows = [_shift_rows(w, len(line)) for w, line in zip(self.weights, known, strict=True)]
        n_z, n_y, n_x = (w @ s.T for w, s in zip(self.weights, shifted, strict=True))
        n = np.maximum(n_z[:, :, None, None] * n_y[:, None, :, None] * n_x[:, None, None], 1e-6)
        a, aa = contract(self.products, shifted)
        b, bb = contract(np.stack([area, area * area])[:, None], windows)
        ab = self._slide(area, n.shape[1:])
        variance = np.maximum(aa - a * a / n, 0) * np.maximum(bb - b * b / n, 0)
        correlation = (ab - a * b / n) / np.sqrt(variance + (1e-3 * n) ** 2)
        enough = n >= self.least[:, None, None, None]
        return np.asarray(np.where(enough, correlation, -np.inf).mean(axis=0))

    def _slide(self, area: Floats, size: Sequence[int]) -> Floats:
        """(2, Z, Y, X) sums of the area times windows and values, at every offset."""
        products = self.spectrum * fft.rfftn(area, self.shape)
        for axis in (1, 2):  # only the offsets that are needed
            products = fft.ifft(products, axis=axis, overwrite_x=True)
            products = products[(slice(None),) * axis + (slice(size[axis - 1]),)]
        return np.asarray(fft.irfft(products, self.shape[2], axis=3)[..., : size[2]])


def _shift_rows(weights: Floats, size: int) -> Floats:
    """(2, n) -> (2, size - n + 1, size): row i has the weights from column i on."""
    two, n = weights.shape
    num = size - n + 1
    rows = np.zeros((two, num, size + 1), np.float32)
    rows[:, :, :n] = weights[:, None]
    return rows.reshape(two, -1)[:, : num * size].reshape(two, num, size)


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


def _fit(here: Thumbnail, place_mm: Point, there: Thumbnail, start_mm: Point) -> Point:
    """The best place near a start, by least squares.

    Both surroundings get mean 0 and mean square 1. A shift along the mean of their gradients
    explains their difference. The sum of squares is least where the correlation is highest.
    """
    template, known = here.sample(place_mm, _FIT_OFFSET_MM)
    window, found = _FIT_WINDOW * outer(*known), start_mm
    for _ in range(_FIT_ROUNDS):
        area, known_there = there.sample(found, _FIT_OFFSET_MM)
        weight = window * outer(*known_there)
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

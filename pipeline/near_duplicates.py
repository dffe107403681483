"""Scans that are almost the same: a resampled copy, or two reconstructions of one acquisition.

Coarse descriptions of thumbnails propose candidates, then the thumbnails of each candidate pair are
compared. See docs/design/0018-near-duplicates.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from pipeline.archive.volume import Volume
from pipeline.crops import resample
from pipeline.features import Floats, area_weights, contract

MIN_SIMILARITY: Final = 0.9
"""Similarity from which two scans count as almost the same."""
_HU: Final = (-900, 300)
"""Outside this range, copies may be clipped."""
CELLS: Final = (8, 16, 16)
_DESCRIBED = (4, 8, 8)
"""Values of a description, along z, y and x."""
_CUT = {14: (1,), 13: (1, 2), 12: (2,)}
"""In-plane, of 16 cells: lengths of what a smaller field of view shows, and where it begins."""
_CANDIDATES, _MIN_LIKENESS = 6, 0.9
"""Candidates of each scan, and the least correlation of their descriptions with its own."""
_EXHAUSTIVE = 80_000
"""Maximum number of scans of which each is compared with all: as fast as an inverted file index."""
_SCANS_PER_LIST, _PROBED = 1000, 8
"""Of an inverted file index: scans in a list, about, and lists that are searched."""
_BLOCK = 4096
"""Scans that are searched for at once: bounds memory."""
_ALIGN_MM, _ALIGN_SIGMA_MM, _MIN_OVERLAP, _MIN_ALIGNED = 10.0, 20.0, 0.4, 0.7
"""To find the shift between two scans: grid, what is filtered out as too coarse, and the least
overlap (a share of the smaller scan) and correlation."""
_STEP_MM, _SIGMA_MM, _REFINEMENTS = (6.0, 4.0, 4.0), 12.0, 2
"""To refine the shift and compute the similarity."""

Flips: TypeAlias = tuple[int, ...]
"""Axes along which a scan is mirrored."""


class Candidate(NamedTuple):
    """Two scans that may be almost the same, by row; the second perhaps mirrored."""

    first: int
    second: int
    flips: Flips


class _View(NamedTuple):
    """What another scan may show of this one."""

    part: tuple[slice, slice, slice] = (slice(None), slice(None), slice(None))
    """Of the cells."""
    flips: Flips = ()


def _views() -> Iterator[_View]:
    for number in range(4):
        yield from (_View(flips=flips) for flips in itertools.combinations(range(3), number))
    whole = slice(None)
    for low, high in ((0, 6), (1, 7), (2, 8), (0, 4), (4, 8)):  # of 8 cells along z
        yield _View((slice(low, high), whole, whole))
    for length, lows in _CUT.items():
        parts = [slice(low, low + length) for low in lows]
        yield from (_View((whole, y, x)) for y in parts for x in parts)


_VIEWS: Final = tuple(_views())


def as_volume(
    thumbnail: NDArray[np.uint8], box_mm: NDArray[np.float64], window_hu: tuple[int, int]
) -> Volume:
    """A thumbnail as a coarse scan of its frame box.

    box_mm
        (2, 3) low and high corner.
    window_hu
        HU of the values 0 and 255.
    """
    z, y, x = (box_mm[1] - box_mm[0]) / thumbnail.shape
    return Volume(hu=_clipped_hu(window_hu)[thumbnail], spacing_mm=(z, y, x))


def _clipped_hu(window_hu: tuple[int, int]) -> NDArray[np.int16]:
    """HU of each value of a thumbnail."""
    return np.clip(np.linspace(*window_hu, 256), *_HU).astype(np.int16)


def describe_cells(thumbnail: NDArray[np.uint8], window_hu: tuple[int, int]) -> NDArray[np.uint8]:
    """(8, 16, 16) uint8: the mean of equal parts of a thumbnail, `_HU` mapped to 0..255."""
    sizes = zip(thumbnail.shape, CELLS, strict=True)
    hu = _clipped_hu(window_hu).astype(np.float32)[thumbnail]
    mean = contract(hu, [area_weights(size, n) for size, n in sizes])
    return np.asarray(np.rint((mean - _HU[0]) * (255 / (_HU[1] - _HU[0]))), np.uint8)


def find_candidates(cells: NDArray[np.uint8], patient: NDArray[np.integer[Any]]) -> list[Candidate]:
    """Pairs of scans of different patients whose descriptions are alike, in order of rows.

    cells
        (N, 8, 16, 16), of `describe_cells`.
    patient
        (N,) numbers.

    Up to 80,000 scans, each is compared with all. From there on, an index is searched, which
    compares it with about 8000, so that the time for one scan does not grow.
    """
    import faiss  # noqa: PLC0415 - workers do not need it

    exhaustive = len(cells) <= _EXHAUSTIVE
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(cells), _BLOCK)]
    vectors = np.concatenate([_vectors(cells[block], _View()) for block in blocks])
    kind = "Flat" if exhaustive else f"IVF{math.ceil(len(cells) / _SCANS_PER_LIST)},Flat"
    index: Any = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    if not exhaustive:
        index.nprobe = _PROBED
    found: dict[tuple[int, int], tuple[float, Flips]] = {}
    for block in blocks:
        rows = np.arange(len(cells))[block]
        likeness, other = (
            np.concatenate(results, axis=1)
            for results in zip(
                *(index.search(_vectors(cells[rows], view), _CANDIDATES + 1) for view in _VIEWS),
                strict=True,
            )
        )
        likeness[(patient[other] == patient[rows, None]) | (other < 0)] = -1
        for row, alike, others in zip(rows.tolist(), np.round(likeness, 4), other, strict=True):
            for second, candidate in _most_alike(alike, others).items():
                pair = min(row, second), max(row, second)
                found[pair] = max(found.get(pair, candidate), candidate)
    return [Candidate(*pair, flips) for pair, (_, flips) in sorted(found.items())]


def _most_alike(
    likeness: Floats, others: NDArray[np.integer[Any]]
) -> dict[int, tuple[float, Flips]]:
    """Likeness and flips of the scans that are most like one scan, by row.

    likeness, others
        What each view of the scan found, one view after the other.
    """
    best: dict[int, tuple[float, Flips]] = {}
    for column in np.argsort(-likeness, kind="stable").tolist():
        if likeness[column] < _MIN_LIKENESS or len(best) == _CANDIDATES:
            break
        view = _VIEWS[column // (_CANDIDATES + 1)]
        best.setdefault(int(others[column]), (float(likeness[column]), view.flips))
    return best


def _vectors(cells: NDArray[np.uint8], view: _View) -> Floats:
    """(n, 256) float32: the cells of a view at a coarser grid, with mean 0 and length 1."""
    seen = np.flip(cells, tuple(1 + axis for axis in view.flips))[(slice(None), *view.part)]
    shares = [area_weights(size, n) for size, n in zip(seen.shape[1:], _DESCRIBED, strict=True)]
    flat = contract(seen.astype(np.float32), shares).reshape(len(cells), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1e-6
    return np.ascontiguousarray(flat)


def similarity(first: Volume, second: Volume, flips: Flips) -> float:
    """How similar two scans are where both show the patient, at most 1; -1 without such a part.

    first, second
        Of `as_volume`.
    flips
        Axes along which the second is mirrored.

    The shift between the scans is found on a coarse grid for all shifts at once, then refined.
    The similarity is the correlation of what is finer than about 12 mm.
    """
    second = Volume(hu=np.flip(second.hu, flips), spacing_mm=second.spacing_mm)
    aligned, shift_mm = _align(first, second)
    if aligned < _MIN_ALIGNED:
        return -1.0
    for _ in range(_REFINEMENTS):
        shift_mm = shift_mm + _remaining_shift(*_shared_part(first, second, shift_mm))
    here, there = _shared_part(first, second, shift_mm)
    scale = np.sqrt((here * here).sum() * (there * there).sum() + 1)
    return round(float((here * there).sum() / scale), 3)


def _align(first: Volume, second: Volume) -> tuple[float, NDArray[np.float64]]:
    """Highest normalised cross-correlation of two scans, and the shift where it is found.

    The shift is the position of the second scan's low corner from the first's, in mm. At least
    `_MIN_OVERLAP` of the smaller scan lies within the other.
    """
    (here, start), (there, other_start) = _coarse(first), _coarse(second)
    size = [
        fft.next_fast_len(n + m - 1, real=True)
        for n, m in zip(here.shape, there.shape, strict=True)
    ]

    def correlate(a: Floats, b: Floats) -> Floats:
        product = fft.rfftn(a, size) * np.conj(fft.rfftn(b, size))
        result: Floats = fft.irfftn(product, size)
        return result

    ones, other_ones = np.ones_like(here), np.ones_like(there)
    overlap = correlate(ones, other_ones)
    power = correlate(here * here, other_ones) * correlate(ones, there * there)
    score = correlate(here, there) / np.sqrt(np.maximum(power, 1))
    score[overlap < _MIN_OVERLAP * min(here.size, there.size)] = -1
    best = np.unravel_index(score.argmax(), score.shape)
    steps = [int(i) - (n if i >= m else 0) for i, n, m in zip(best, size, here.shape, strict=True)]
    return float(score[best]), start + np.multiply(steps, _ALIGN_MM) - other_start


def _coarse(volume: Volume) -> tuple[Floats, NDArray[np.float64]]:
    """A scan on an even grid, without what is coarser than `_ALIGN_SIGMA_MM`; its low corner."""
    extent = volume.edges_mm[1] - volume.edges_mm[0]
    shape = np.maximum(2, np.rint(extent / _ALIGN_MM)).astype(int)
    start = 0.5 * (extent - shape * _ALIGN_MM)
    values = resample(
        volume, origin_mm=volume.edges_mm[0] + start, extent_mm=shape * _ALIGN_MM, shape=shape
    )
    return _without_coarse(values, [_ALIGN_SIGMA_MM / _ALIGN_MM] * 3), start


def _shared_part(
    first: Volume, second: Volume, shift_mm: NDArray[np.float64]
) -> tuple[Floats, Floats]:
    """What both scans show, on one grid, without what is coarser than `_SIGMA_MM`."""
    edges, other_edges = first.edges_mm, second.edges_mm
    low = np.maximum(0, shift_mm)
    high = np.minimum(edges[1] - edges[0], other_edges[1] - other_edges[0] + shift_mm)
    shape = np.maximum(2, np.rint((high - low) / _STEP_MM)).astype(int)
    here, there = (
        resample(volume, origin_mm=corner, extent_mm=high - low, shape=shape)
        for volume, corner in (
            (first, edges[0] + low),
            (second, other_edges[0] + low - shift_mm),
        )
    )
    sigma = np.divide(_SIGMA_MM, _STEP_MM)
    return _without_coarse(here, sigma), _without_coarse(there, sigma)


def _without_coarse(values: Floats, sigma: Sequence[float] | NDArray[np.float64]) -> Floats:
    smooth: Floats = ndimage.gaussian_filter(values, sigma, mode="nearest", truncate=3)
    return values - smooth


def _remaining_shift(here: Floats, there: Floats) -> NDArray[np.float64]:
    """Shift in mm that is still to add, by one step of Lucas and Kanade (1981)."""
    gain = (here * there).sum() / ((there * there).sum() + 1)
    slopes = gain * np.stack([slope.ravel() for slope in np.gradient(there)])
    steps = np.linalg.lstsq(slopes @ slopes.T, slopes @ (here - gain * there).ravel(), rcond=None)
    return np.asarray(-np.clip(steps[0], -2, 2) * _STEP_MM, np.float64)

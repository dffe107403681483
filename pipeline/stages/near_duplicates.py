"""Find scans of different patients that are almost the same; thumbnails are compared by workers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from pipeline.archive.volume import Volume
from pipeline.config import PrepareConfig
from pipeline.crops import one_blas_thread
from pipeline.near_duplicates import (
    MIN_SIMILARITY,
    Flips,
    as_volume,
    find_candidates,
    similarity,
)
from pipeline.tasks import raise_if_failed, run_bounded
from store.progress import Progress
from store.sharded import ShardedReader

NearDuplicate: TypeAlias = tuple[int, int, float]
"""Rows of two scans, the lower first, and their similarity."""


class _Scan(NamedTuple):
    row: int
    box_mm: NDArray[np.float64]
    flips: Flips = ()


def find_near_duplicates(
    client: Client,
    store: Path,
    *,
    cells: NDArray[np.uint8],
    patient: NDArray[np.integer[Any]],
    box_mm: NDArray[np.float64],
    config: PrepareConfig,
    progress: Progress,
) -> list[NearDuplicate]:
    """Pairs of scans of different patients that are almost the same, in order of rows.

    store
        Has the thumbnails.
    cells, patient, box_mm
        Of all N scans: their descriptions (N, 8, 16, 16), patients (N,), frame boxes (N, 2, 3).
    """
    candidates = find_candidates(cells, patient)
    items = [
        (
            _Scan(first, box_mm[first]),
            tuple(_Scan(one.second, box_mm[one.second], one.flips) for one in group),
        )
        for first, group in itertools.groupby(candidates, key=lambda one: one.first)
    ]
    found: list[NearDuplicate] = []
    with progress.stage("near-duplicates", len(items), "scans") as advance:
        results = run_bounded(client, compare_scans, items, str(store), config.window_hu)
        for _, similar in results:
            raise_if_failed(similar)
            found += similar
            advance(1)
    return sorted(found)


# Functions that workers run ----------------------------------------------------------------------


def compare_scans(
    item: tuple[_Scan, Sequence[_Scan]], store: str, window_hu: tuple[int, int]
) -> list[NearDuplicate]:
    """Compare one scan with others; returns those that are almost the same."""
    first, others = item
    with one_blas_thread():
        here = _load(first, store, window_hu)
        scored = [
            (first.row, other.row, similarity(here, _load(other, store, window_hu), other.flips))
            for other in others
        ]
    return [pair for pair in scored if pair[2] >= MIN_SIMILARITY]


def _load(scan: _Scan, store: str, window_hu: tuple[int, int]) -> Volume:
    return as_volume(_reader(store).read([scan.row])[0], scan.box_mm, window_hu)


@lru_cache(maxsize=1)
def _reader(store: str) -> ShardedReader:
    return ShardedReader(Path(store), "scans/thumbnail")

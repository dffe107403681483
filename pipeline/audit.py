"""Compare a sample of a store's crops with crops cut again from the archive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.archive.lookup import read_series
from pipeline.archive.series import Series
from pipeline.archive.volume import Volume, read_volume
from pipeline.config import PrepareConfig
from pipeline.crops import cut_crop, one_blas_thread
from store.format import SPLITS
from store.images import Rejected
from store.progress import SILENT, Advance, Progress
from store.reader import PatchStore, Split
from store.settings import build
from store.verification import Problem


def audit(path: str | Path, *, sample: int, progress: Progress = SILENT) -> Iterator[Problem]:
    """Read the sources of `sample` random crops (all crops if there are fewer), yield problems.

    Raises StoreError without the store's private catalogue.
    """
    store = PatchStore(path)
    config = build(PrepareConfig, store.config)
    counts = [len(store.split(name)) for name in SPLITS]
    chosen = np.random.default_rng(0).permutation(sum(counts))[:sample]
    split_of = (chosen >= counts[0]).astype(int)
    row_of = chosen - counts[0] * split_of
    scan_of = np.array(
        [
            store.split(SPLITS[number]).scan[row]
            for number, row in zip(split_of, row_of, strict=True)
        ]
    )
    scans = np.unique(scan_of).tolist()
    with progress.stage("re-cut", len(chosen), "crops") as advance:
        for scan, series in zip(scans, read_series(store.path, scans), strict=True):
            ours = scan_of == scan
            volume = _read_unchanged(series, int(store.scans.id[scan]), config)
            if volume is None:
                yield Problem("scans", "source is missing or changed since the survey", (scan,))
                advance(int(ours.sum()))
                continue
            for number, name in enumerate(SPLITS):
                rows = np.sort(row_of[ours & (split_of == number)])
                wrong = _compare(volume, store.split(name), rows, config, advance)
                if wrong:
                    yield Problem(f"{name}/patch", "differs from the archive", wrong)


def _read_unchanged(series: Series, scan_id: int, config: PrepareConfig) -> Volume | None:
    """The volume of a series; None where it cannot be read, or is another scan."""
    try:
        volume = read_volume(series, config)
        return volume if volume.scan_id() == scan_id else None
    except (Rejected, OSError, RuntimeError):
        return None


def _compare(
    volume: Volume,
    split: Split,
    rows: NDArray[np.intp],
    config: PrepareConfig,
    advance: Advance,
) -> tuple[int, ...]:
    """Those rows of a split whose stored crop is broken, or differs from the volume's."""
    stored = np.zeros((len(rows), *config.shape), np.int16)
    wrong = set(split.patch.read_into(rows, stored))
    for row, crop in zip(rows.tolist(), stored, strict=True):
        with one_blas_thread():
            again = cut_crop(
                volume,
                origin_mm=split.origin_mm[row].tolist(),
                extent_mm=split.extent_mm[row].tolist(),
                shape=config.shape,
                window_hu=config.window_hu,
            )
        if not np.array_equal(again, crop):
            wrong.add(row)
        advance(1)
    return tuple(sorted(wrong))

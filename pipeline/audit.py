"""Cut a sample of a store's crops again from the archive, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipeline.archive.catalogue import read_series
from pipeline.archive.volume import read_volume
from pipeline.config import PrepareConfig
from pipeline.crops import cut_crop
from store.format import SPLITS
from store.images import Rejected
from store.reader import PatchStore
from store.settings import build
from store.verification import Problem


def audit(
    path: Path, *, sample: int, seed: int = 0, progress: Callable[[int], None] = lambda _: None
) -> Iterator[Problem]:
    """Read the sources of `sample` random crops (of all, where there are fewer), yield problems.

    progress
        Called with the number of crops just compared.

    Raises StoreError without the store's private catalogue.
    """
    store = PatchStore(path)
    config = build(PrepareConfig, store.config)
    counts = [len(store.split(name)) for name in SPLITS]
    chosen = np.random.default_rng(seed).permutation(sum(counts))[:sample]
    chosen = np.stack([chosen >= counts[0], chosen - counts[0] * (chosen >= counts[0])], axis=1)
    scan_of = np.array([store.split(SPLITS[number]).scan[row] for number, row in chosen])
    scans = np.unique(scan_of).tolist()
    for scan, series in zip(scans, read_series(path, scans), strict=True):
        ours = chosen[scan_of == scan]
        try:
            volume = read_volume(series, config)
            unchanged = volume.scan_id() == int(store.scans.id[scan])
        except (Rejected, OSError, RuntimeError):
            unchanged = False
        if not unchanged:
            yield Problem("scans", "source is missing or changed since the survey", (scan,))
            progress(len(ours))
            continue
        for number, name in enumerate(SPLITS):
            split = store.split(name)
            wanted = np.sort(ours[ours[:, 0] == number, 1])
            stored = np.zeros((len(wanted), *config.shape), np.int16)
            broken = set(split.patch.read_into(wanted, stored))
            other = []
            for row, crop in zip(wanted.tolist(), stored, strict=True):
                again = cut_crop(
                    volume,
                    origin_mm=split.origin_mm[row].tolist(),
                    extent_mm=split.extent_mm[row].tolist(),
                    shape=config.shape,
                    window_hu=config.window_hu,
                )
                if row in broken or not np.array_equal(again, crop):
                    other.append(row)
                progress(1)
            if other:
                yield Problem(f"{name}/patch", "not what the archive gives", tuple(other))

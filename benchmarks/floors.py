"""The least that a stage can take: plain processes that read the files, and write ready crops."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from pipeline.archive.series import Series
from store import PatchStore
from store.format import SPLITS
from store.sharded import ShardedReader
from store.writer import StoreWriter, write_shard


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall time of the process that took longest, and CPU time of all processes."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def read_only(series: Series) -> int:
    """Read a series the plain way; its voxels."""
    image = sitk.ReadImage(series.files if len(series.files) > 1 else series.files[0])
    return image.GetNumberOfPixels()


def floor_of_survey(series: list[Series], workers: int) -> float:
    """Seconds to only read the series."""
    with get_context("spawn").Pool(workers) as pool:
        pool.map(abs, range(workers * 4))  # started and warm
        begun = time.perf_counter()
        pool.map(read_only, series, chunksize=1)
        return time.perf_counter() - begun


@dataclass(frozen=True, slots=True)
class _Share:
    """A scan with crops, and the shards that begin among them."""

    series: Series
    source: Path
    target: Path
    name: str
    shards: tuple[int, ...]


def floor_of_cut(
    store: Path, series: list[Series], work: Path, workers: int
) -> tuple[Seconds, Seconds]:
    """To read the scans of a store that have crops; to encode, check and write its crops again.

    store
        With its crops, which are decoded from it, outside the measured time.
    series
        Of each scan of the store.
    work
        Folder for the store that is written, and deleted by the caller.
    """
    shares = list(_shares(PatchStore(store, allow_building=True), series, work))
    with get_context("spawn").Pool(workers) as pool:
        pool.map(abs, range(workers * 4))  # started and warm
        of_process: dict[int, tuple[Seconds, Seconds]] = {}
        for pid, read, written in pool.imap_unordered(_read_and_write, shares):
            before = of_process.get(pid, (Seconds(), Seconds()))
            of_process[pid] = before[0] + read, before[1] + written
    longest = max(of_process.values(), key=lambda both: both[0].wall + both[1].wall)
    total = [sum(both[n].cpu for both in of_process.values()) for n in range(2)]
    return replace(longest[0], cpu=total[0]), replace(longest[1], cpu=total[1])


def _shares(store: PatchStore, series: list[Series], work: Path) -> Iterable[_Share]:
    writer = StoreWriter.create(work, config={}, software={})
    for split in SPLITS:
        rows = store.split(split)
        name, grid = f"{split}/patch", rows.patch.grid
        writer.create_sharded(
            name, shape=rows.patch.shape, dtype="int16", rows_per_shard=grid.rows_per_shard
        )
        first_scan = rows.scan[:: grid.rows_per_shard]  # of each shard
        for scan in np.unique(rows.scan).tolist():
            shards = np.flatnonzero(first_scan == scan).tolist()
            yield _Share(series[scan], store.path, work, name, tuple(shards))


def _read_and_write(share: _Share) -> tuple[int, Seconds, Seconds]:
    begun = _Clock()
    read_only(share.series)
    read = begun.stop()
    written = Seconds()
    reader = ShardedReader(share.source, share.name)
    for shard in share.shards:
        crops = reader.read(reader.grid.rows_of(shard))
        begun = _Clock()
        write_shard(share.target, share.name, shard, crops)
        written += begun.stop()
    return os.getpid(), read, written


class _Clock:
    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Seconds:
        return Seconds(time.perf_counter() - self.wall, time.process_time() - self.cpu)

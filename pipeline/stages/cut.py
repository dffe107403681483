"""Stage cut: read every needed scan once more, and cut its crops into shards.

The functions that workers run come last; they write shards and touch no catalogue.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from distributed import Client, KilledWorker
from numpy.typing import NDArray

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.series import Series
from pipeline.archive.volume import read_volume
from pipeline.config import PrepareConfig
from pipeline.crops import cut_crop, one_blas_thread
from pipeline.errors import PrepareError
from pipeline.tasks import num_threads, raise_if_failed, run_alone, run_bounded
from store.errors import SemgenError
from store.format import SPLITS
from store.group import open_sharded
from store.images import Rejected
from store.progress import Advance, Progress
from store.reader import PatchStore
from store.scans import scan_name
from store.sharded import ShardedReader
from store.writer import write_shard

_log = logging.getLogger(__name__)
_SHARDS_PER_CHECK = 16

Piece: TypeAlias = str | NDArray[np.int16]
"""Result of cutting a scan for a shard: the shard's digest where it was written, or the crops."""


class SourceChanged(SemgenError):
    """A scan's voxels are no longer those that were surveyed."""


def cut_crops(
    client: Client,
    store: PatchStore,
    catalogue: Catalogue,
    config: PrepareConfig,
    progress: Progress,
) -> dict[str, list[str]]:
    """Run the stage: cut every crop that is not there yet; returns the shards' digests by array."""
    digests = _check_existing(client, store, progress)
    total = sum(len(store.split(split)) for split in SPLITS)
    done = sum(
        len(store.split(split).patch.grid.rows_of(shard))
        for split in SPLITS
        for shard, digest in enumerate(digests[f"{split}/patch"])
        if digest is not None
    )
    with progress.stage("cut", total, "crops", done=done) as advance:
        for split in SPLITS:
            plan = _SplitPlan(store, catalogue, split, digests[f"{split}/patch"])
            _cut_split(client, plan, config, advance)
    return {name: [d for d in by_shard if d is not None] for name, by_shard in digests.items()}


def _check_existing(
    client: Client, store: PatchStore, progress: Progress
) -> dict[str, list[str | None]]:
    """Digests of the shards that are present and valid, by array; None for the others."""
    grids = {"scans/thumbnail": store.thumbnails.grid}
    grids |= {f"{split}/patch": store.split(split).patch.grid for split in SPLITS}
    digests: dict[str, list[str | None]] = {n: [None] * g.num_shards for n, g in grids.items()}
    batches = [
        (name, tuple(range(grid.num_shards)[start : start + _SHARDS_PER_CHECK]))
        for name, grid in grids.items()
        for start in range(0, grid.num_shards, _SHARDS_PER_CHECK)
    ]
    with progress.stage("check shards", len(batches), "batches") as advance:
        for (name, shards), present in run_bounded(client, check_shards, batches, str(store.path)):
            raise_if_failed(present)
            digests[name][shards[0] : shards[-1] + 1] = present
            advance(1)
    if None in digests["scans/thumbnail"]:
        raise PrepareError(
            f"{store.path}: thumbnails were damaged after they were written; delete the store and"
            " prepare again"
        )
    return digests


class _SplitPlan:
    """The crops of one split: which scans a shard needs, and what to cut from each."""

    def __init__(
        self, store: PatchStore, catalogue: Catalogue, split: str, digests: list[str | None]
    ) -> None:
        self.path, self.split, self.digests = store.path, split, digests
        self.catalogue, self.scan_id = catalogue, store.scans.id
        self.rows = store.split(split)
        self.grid = self.rows.patch.grid

    def scans_of(self, rows: range) -> list[int]:
        """Scans with crops among these rows, in order."""
        scans: list[int] = np.unique(self.rows.scan[rows.start : rows.stop]).tolist()
        return scans

    def scan_cut(self, scan: int) -> ScanCut:
        """All crops of one scan, and the missing shards that they belong to."""
        first, stop = np.searchsorted(self.rows.scan, [scan, scan + 1]).tolist()
        shards = self.grid.shards_of(range(first, stop))
        return ScanCut(
            series=self.catalogue.scan_series(scan),
            scan_id=int(self.scan_id[scan]),
            split=self.split,
            first_row=first,
            origin_mm=self.rows.origin_mm[first:stop],
            extent_mm=self.rows.extent_mm[first:stop],
            shards=tuple(shard for shard in shards if self.digests[shard] is None),
        )


def _cut_split(client: Client, plan: _SplitPlan, config: PrepareConfig, advance: Advance) -> None:
    """Cut the missing shards of one split, in row order, and fill in their digests.

    A scan is read by one task for all its crops. That task writes the shards that have crops of
    this scan only, and passes its crops of other shards to the tasks that write those: one for all
    shards that begin with the same scan, because each task costs the scheduler milliseconds. Where
    Dask gives up one of these tasks, because workers were lost, one task cuts each whole shard.
    """
    path, grid, digests = str(plan.path), plan.grid, plan.digests
    limit = 2 * num_threads(client)  # of shards and of scans in flight
    cuts: dict[int, Any] = {}  # futures, by scan
    in_flight: deque[tuple[list[int], Any]] = deque()  # shards and future

    def collect() -> None:
        shards, future = in_flight.popleft()
        try:
            found = future.result()
        except KilledWorker:
            found = []
            for shard in shards:
                scans = [plan.scan_cut(scan) for scan in plan.scans_of(grid.rows_of(shard))]
                ((_, digest),) = run_alone(client, cut_shard, [shard], path, scans, config)
                raise_if_failed(digest)
                found.append(digest)
        for shard, digest in zip(shards, found, strict=True):
            digests[shard] = digest
            _log.debug("%s: shard %d of %d is written", plan.split, shard + 1, grid.num_shards)
            advance(len(grid.rows_of(shard)))

    missing = (shard for shard in range(grid.num_shards) if digests[shard] is None)
    for _, group in itertools.groupby(missing, lambda shard: plan.scans_of(grid.rows_of(shard))[0]):
        shards = list(group)
        rows = range(grid.rows_of(shards[0]).start, grid.rows_of(shards[-1]).stop)
        scans = plan.scans_of(rows)
        cuts = {s: cut for s, cut in cuts.items() if s in scans and cut.status != "error"}
        for scan in scans:
            if scan not in cuts:
                cuts[scan] = client.submit(
                    cut_scan,
                    path,
                    plan.scan_cut(scan),
                    config,
                    key=f"cut-{plan.split}-{scan}",
                    pure=False,
                )
        done = client.submit(
            finish_shards,
            path,
            plan.split,
            shards,
            [cuts[scan] for scan in scans],
            key=f"finish-{plan.split}-{shards[0]}",
            pure=False,
        )
        in_flight.append((shards, done))
        oldest = grid.rows_of(in_flight[0][0][0]).start
        if len(in_flight) >= limit and len(plan.scans_of(range(oldest, rows.stop))) > limit:
            collect()
    while in_flight:
        collect()


# Functions that workers run ----------------------------------------------------------------------


def check_shards(item: tuple[str, tuple[int, ...]], store: str) -> list[str | None]:
    """Digests of shards that are present and valid, None for the others."""
    name, shards = item
    reader = ShardedReader(Path(store), name)
    return [reader.digest(shard) for shard in shards]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanCut:
    """The crops to cut from one scan: rows `first_row` to `first_row + n` of `split`."""

    series: Series
    scan_id: int
    split: str
    first_row: int
    origin_mm: NDArray[np.float64]
    """(n, 3) first corners."""
    extent_mm: NDArray[np.float64]
    """(n, 3) sizes."""
    shards: tuple[int, ...]
    """Shards that are still to be written."""

    def __repr__(self) -> str:
        return f"<ScanCut {scan_name(self.scan_id)}: {len(self.origin_mm)} crops>"


def cut_scan(store: str, cut: ScanCut, config: PrepareConfig) -> dict[int, Piece]:
    """Cut one scan's crops for the missing shards, reading the scan once.

    Raises SourceChanged when its voxels are not those that were surveyed.
    """
    try:
        volume = read_volume(cut.series, config)
        scan_id = volume.scan_id()
    except (Rejected, OSError, RuntimeError):
        scan_id = None
    if scan_id != cut.scan_id:
        raise SourceChanged(
            f"scan {scan_name(cut.scan_id)}: its voxels changed since the survey, or can no longer"
            " be read; restore its files (`semgen inspect STORE --paths` names them) and run the"
            " same command again"
        )
    name = f"{cut.split}/patch"
    _, grid = open_sharded(Path(store), name)
    stop_row = cut.first_row + len(cut.origin_mm)
    pieces: dict[int, Piece] = {}
    buffer = np.empty((grid.rows_per_shard, *config.shape), np.int16)  # fresh memory costs time
    for shard in cut.shards:
        rows = grid.rows_of(shard)
        ours = range(max(cut.first_row, rows.start), min(stop_row, rows.stop))
        crops = buffer[: len(ours)]
        with one_blas_thread():
            for crop, row in zip(crops, ours, strict=True):
                crop[...] = cut_crop(
                    volume,
                    origin_mm=cut.origin_mm[row - cut.first_row].tolist(),
                    extent_mm=cut.extent_mm[row - cut.first_row].tolist(),
                    shape=config.shape,
                    window_hu=config.window_hu,
                )
        alone = len(ours) == len(rows)
        pieces[shard] = write_shard(Path(store), name, shard, crops) if alone else crops.copy()
    return pieces


def finish_shards(
    store: str, split: str, shards: list[int], cuts: list[dict[int, Piece]]
) -> list[str]:
    """Write shards from the scans that share them, in row order; returns their digests."""
    digests = []
    for shard in shards:
        pieces = [cut[shard] for cut in cuts if shard in cut]
        if isinstance(pieces[0], str):
            digests.append(pieces[0])
            continue
        crops = np.concatenate([piece for piece in pieces if not isinstance(piece, str)])
        digests.append(write_shard(Path(store), f"{split}/patch", shard, crops))
    return digests


def cut_shard(shard: int, store: str, cuts: list[ScanCut], config: PrepareConfig) -> str:
    """Cut one shard from all scans that share it, and write it; returns its digest."""
    pieces = [cut_scan(store, replace(cut, shards=(shard,)), config) for cut in cuts]
    (digest,) = finish_shards(store, cuts[0].split, [shard], pieces)
    return digest

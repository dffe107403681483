"""What workers do: small functions that read, cut and write. They touch no catalogue.

Bad data never raises here; it comes back as a reason, so that no path reaches Dask's logs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.archive.catalogue import Surveyed, thumbnail_path
from pipeline.archive.series import INTERNAL, Series
from pipeline.archive.volume import read_volume
from pipeline.config import PrepareConfig
from pipeline.crops import cut_crop, make_thumbnail
from pipeline.frame import frame_box
from store.errors import SemgenError
from store.format import THUMBNAIL_SHAPE
from store.group import open_sharded
from store.images import Rejected
from store.reader import ShardedReader
from store.shards import decode_chunk, encode_chunk
from store.writer import write_shard

Piece = str | NDArray[np.int16]
"""What cutting a scan gives for a shard: its digest when written, or this scan's rows of it."""


class SourceChanged(SemgenError):
    """A scan's voxels are no longer those that were surveyed."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """End this process when the time is over: nothing else stops a reading library that hangs.

    For workers of one thread. The job then sees a dead worker.
    """
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def survey_series(series: Series, config: PrepareConfig, survey_folder: str) -> Surveyed:
    """Read one series; leave its thumbnail in the survey folder."""
    try:
        with time_limit(config.max_read_seconds):
            volume = read_volume(series, config)
        box = frame_box(volume, config.frame)
        thumbnail = make_thumbnail(volume, box, THUMBNAIL_SHAPE, config)
    except Rejected as rejected:
        return Surveyed(key=series.key, reason=rejected.reason, detail=rejected.detail)
    except (MemoryError, OSError) as error:
        return Surveyed(key=series.key, reason="unreadable", detail=type(error).__name__)
    except Exception:  # a bug: it costs this series, not the job
        return Surveyed(key=series.key, reason=INTERNAL, detail=traceback.format_exc())
    save_thumbnail(thumbnail_path(Path(survey_folder), series.key), thumbnail)
    return Surveyed(
        key=series.key,
        scan_id=volume.scan_id(),
        spacing_mm=volume.spacing_mm,
        size=volume.hu.shape,
        frame_mm=tuple(tuple(corner) for corner in box.tolist()),
    )


def save_thumbnail(file: Path, thumbnail: NDArray[np.uint8]) -> None:
    """Leave a thumbnail for `collect_thumbnails`, packed as the store's chunks are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_bytes(encode_chunk(thumbnail))
    partial.replace(file)


def collect_thumbnails(item: tuple[int, tuple[str, ...]], store: str, survey_folder: str) -> None:
    """Write one shard of `scans/thumbnail` from the survey's files."""
    shard, keys = item
    thumbnails = np.empty((len(keys), *THUMBNAIL_SHAPE), np.uint8)
    for thumbnail, key in zip(thumbnails, keys, strict=True):
        if not decode_chunk(thumbnail_path(Path(survey_folder), key).read_bytes(), thumbnail):
            raise SemgenError(
                f"{Path(store).name}: a thumbnail of the survey is damaged; delete the store and"
                " its catalogue and prepare again"
            )
    write_shard(Path(store), "scans/thumbnail", shard, thumbnails)


def check_shards(item: tuple[str, tuple[int, ...]], store: str) -> list[str | None]:
    """Digests of shards that are present and valid, None for the others."""
    name, shards = item
    reader = ShardedReader(Path(store), name)
    return [reader.digest(shard) for shard in shards]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanCut:
    """Everything that cutting one scan needs to know.

    The scan's crops are rows `first_row`, ... of `split`; `origin_mm` and `extent_mm` are their
    boxes, (n, 3). `shards` are those still to be written.
    """

    series: Series
    scan_id: int
    split: str
    first_row: int
    origin_mm: NDArray[np.float64]
    extent_mm: NDArray[np.float64]
    shards: tuple[int, ...]

    def __repr__(self) -> str:
        return f"<ScanCut {self.scan_id:016x}: {len(self.origin_mm)} crops>"


def cut_scan(store: str, cut: ScanCut, config: PrepareConfig) -> dict[int, Piece]:
    """Cut one scan's crops for the wanted shards, reading the scan once.

    Raises SourceChanged when the scan is not the one that was surveyed.
    """
    try:
        volume = read_volume(cut.series, config)
        found = volume.scan_id()
    except (Rejected, OSError, RuntimeError):
        found = None
    if found != cut.scan_id:
        raise SourceChanged(
            f"scan {cut.scan_id:016x}: its voxels changed since the survey, or can no longer be"
            " read; bring its files back (the private catalogue knows which) and run again"
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


def finish_shard(store: str, split: str, shard: int, cuts: list[dict[int, Piece]]) -> str:
    """Write one shard from the scans that share it, in row order; returns its digest."""
    pieces = [cut[shard] for cut in cuts]
    if isinstance(pieces[0], str):
        return pieces[0]
    crops = np.concatenate([piece for piece in pieces if not isinstance(piece, str)])
    return write_shard(Path(store), f"{split}/patch", shard, crops)

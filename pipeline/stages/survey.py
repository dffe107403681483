"""Stage survey: list an archive's series, read each once, write the tables of scans.

The functions that workers run come last. Bad data never raises there; it comes back as a reason,
so that no path reaches Dask's logs.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from pipeline.archive.catalogue import Catalogue, Surveyed, thumbnail_path
from pipeline.archive.folders import check_present, find_folders
from pipeline.archive.headers import crashed_folder, join_parts, read_folder
from pipeline.archive.manifest import Manifest, select_parts
from pipeline.archive.selection import (
    choose_next_best,
    choose_one_per_study,
    number_scans,
    patients_of_scans,
    reject_duplicates,
    series_in_parts,
)
from pipeline.archive.series import CRASHED, INTERNAL, OUT_OF_MEMORY, Series
from pipeline.archive.volume import read_geometry, read_volume
from pipeline.config import PrepareConfig
from pipeline.crops import make_thumbnail, one_blas_thread
from pipeline.frame import frame_box
from pipeline.isolation import ProcessEnded, ProcessKilled, time_limit
from pipeline.near_duplicates import CELLS, describe_cells
from pipeline.splits import NO_PAIRS, number_patients, split_patients
from pipeline.stages.near_duplicates import find_near_duplicates
from pipeline.tasks import raise_if_failed, run_bounded
from store.atomic import replace_file
from store.errors import SemgenError
from store.format import SURVEY_VERSION, THUMBNAIL_SHAPE
from store.images import UNREADABLE, Rejected
from store.inspect import format_counts
from store.progress import Advance, Progress, show_tally
from store.reader import PatchStore
from store.scans import mean_and_std, scan_name
from store.shards import decode_chunk, encode_chunk
from store.writer import StoreWriter, write_shard

_log = logging.getLogger(__name__)
_THUMBNAILS_PER_SHARD = 64
"""Thumbnails in one shard file, of 1 MiB each before they are compressed."""


def survey_archive(
    client: Client,
    archive: Sequence[Path],
    writer: StoreWriter,
    catalogue: Catalogue,
    config: PrepareConfig,
    *,
    manifest: Manifest | None,
    extend: Path | None,
    progress: Progress,
) -> int:
    """Run the stage: write all tables of `scans` but the embeddings.

    extend
        A store whose survey is used for series that did not change.

    Returns the number of accepted scans. Where it is 0, nothing is written to the store.
    """
    if "survey" in writer.stages:
        return int(writer.stages["survey"]["accepted"])
    catalogue.forget_unreadable()
    _list_series(client, archive, catalogue, config, manifest, progress)
    while True:
        if extend is not None:
            _reuse_survey(extend, catalogue, progress)
        _survey_pending(client, archive, catalogue, config, progress)
        if not (config.one_per_study and choose_next_best(catalogue)):
            break
    reject_duplicates(catalogue)
    accepted = number_scans(catalogue)
    if accepted:
        facts = {
            "accepted": accepted,
            "rejected": catalogue.reasons(),
            "version": SURVEY_VERSION,
            **_write_scans(client, writer, catalogue, config, accepted, progress),
        }
        writer.finish_stage("survey", facts)
    return accepted


def survey_headers(
    client: Client,
    archive: Sequence[Path],
    catalogue: Catalogue,
    config: PrepareConfig,
    manifest: Manifest | None,
    progress: Progress,
) -> None:
    """Fill a catalogue with what headers alone tell: what `survey_archive` would do; no voxels."""
    _list_series(client, archive, catalogue, config, manifest, progress)
    while True:
        with progress.stage("read headers", catalogue.count_pending(), "series") as advance:
            headers = run_bounded(client, inspect_header, catalogue.pending(), config)
            _record(headers, catalogue, progress, advance)
        if not (config.one_per_study and choose_next_best(catalogue)):
            return


def _list_series(
    client: Client,
    archive: Sequence[Path],
    catalogue: Catalogue,
    config: PrepareConfig,
    manifest: Manifest | None,
    progress: Progress,
) -> None:
    """Enter every series of an archive into the catalogue, with what its headers say."""
    num_folders = sum(1 for _ in find_folders(archive))  # a list of all files may not fit in memory
    with progress.stage("list series", num_folders, "folders") as advance:
        rejections, roots = _Rejections(progress), set()
        for folder, result in run_bounded(client, read_folder, find_folders(archive), config):
            if folder.files:
                roots.add(archive[int(folder.origin.partition("/")[0])])
            ended = isinstance(result, ProcessEnded)
            series = [crashed_folder(folder, rejection_reason(result))] if ended else result
            series = manifest.apply(series) if manifest else series
            catalogue.add(series)
            for one in series:
                rejections.count(one.reason)
            advance(1)
        check_present(roots)
        for parts, joined in run_bounded(client, join_parts, series_in_parts(catalogue), config):
            if not isinstance(joined, ProcessEnded):  # else the parts stay as they are
                catalogue.add(select_parts(parts, joined), again=True)
        if manifest:
            catalogue.add(manifest.unused())
        if config.one_per_study:
            choose_one_per_study(catalogue)
        catalogue.commit()


def _reuse_survey(store: Path, catalogue: Catalogue, progress: Progress) -> None:
    thumbnails = PatchStore(store).thumbnails
    with progress.stage("reuse survey", None, "scans") as advance:
        for surveyed, row in catalogue.known_from(store):
            file = thumbnail_path(catalogue.survey_folder, surveyed.key)
            save_thumbnail(file, thumbnails.read([row])[0])
            catalogue.record(surveyed)
            advance(1)
        catalogue.commit()


def _survey_pending(
    client: Client,
    archive: Sequence[Path],
    catalogue: Catalogue,
    config: PrepareConfig,
    progress: Progress,
) -> None:
    folder, done = str(catalogue.survey_folder), catalogue.count_surveyed()
    total = done + catalogue.count_pending()
    with progress.stage("survey", total, "scans", done=done) as advance:
        roots = tuple(map(str, archive))
        surveys = run_bounded(client, survey_series, catalogue.pending(), config, folder, roots)
        _record(surveys, catalogue, progress, advance)


def _record(
    results: Iterable[tuple[Series, Any]],
    catalogue: Catalogue,
    progress: Progress,
    advance: Advance,
) -> None:
    """Enter into the catalogue what workers say of its pending series."""
    rejections = _Rejections(progress, catalogue.reasons())
    for series, result in results:
        ended = isinstance(result, ProcessEnded)
        surveyed = _surveyed(series, result) if ended else result
        catalogue.record(surveyed)
        rejections.count(surveyed.reason)
        if surveyed.scan_id:  # 0 after reading headers alone
            _log.debug("accepted: scan %s", scan_name(surveyed.scan_id))
        advance(1)
    catalogue.commit()


class _Rejections:
    """Counts rejected series by reason, and shows the counts; never a path or a name."""

    def __init__(self, progress: Progress, counts: dict[str, int] | None = None) -> None:
        self.progress, self.counts = progress, Counter(counts)
        self._show()

    def count(self, reason: str | None) -> None:
        """Count one series; None where it is accepted."""
        if reason is not None:
            self.counts[reason] += 1
            _log.debug("rejected: %s (%d)", reason, self.counts[reason])
            self._show()

    def _show(self) -> None:
        if self.counts:
            show_tally(self.progress, f"rejected: {format_counts(dict(self.counts.most_common()))}")


def _surveyed(series: Series, ended: ProcessEnded) -> Surveyed:
    return Surveyed(key=series.key, reason=rejection_reason(ended), detail=str(ended))


def rejection_reason(ended: ProcessEnded) -> str:
    """Why a series is rejected whose reading ended its process."""
    return OUT_OF_MEMORY if isinstance(ended, ProcessKilled) else CRASHED


def _write_scans(
    client: Client,
    writer: StoreWriter,
    catalogue: Catalogue,
    config: PrepareConfig,
    num_scans: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write the tables and thumbnails of the scans; returns what the stage records of them."""
    tables = catalogue.scan_tables()
    cells = _join_thumbnails(client, writer, catalogue, config, num_scans, progress)
    patients = patients_of_scans(catalogue)
    facts: dict[str, Any] = {}
    same = NO_PAIRS
    if config.near_duplicates != "off":
        near = find_near_duplicates(
            client,
            writer.path,
            cells=cells,
            patient=number_patients(patients["scan"], patients["patient"]),
            box_mm=tables["frame_mm"],
            config=config,
            progress=progress,
        )
        facts["near_duplicates"] = near
        if near and config.near_duplicates == "same-split":
            same = np.array([pair[:2] for pair in near])
    tables["patient"], tables["split"] = split_patients(**patients, same=same, config=config)
    for name, values in tables.items():
        writer.write_table(f"scans/{name}", values)
    return facts


def _join_thumbnails(
    client: Client,
    writer: StoreWriter,
    catalogue: Catalogue,
    config: PrepareConfig,
    num_scans: int,
    progress: Progress,
) -> NDArray[np.uint8]:
    """Write `scans/thumbnail`; returns what `describe_cells` says of each scan."""
    grid = writer.create_sharded(
        "scans/thumbnail",
        shape=(num_scans, *THUMBNAIL_SHAPE),
        dtype="uint8",
        rows_per_shard=_THUMBNAILS_PER_SHARD,
    )
    keys = catalogue.scan_keys()
    shards = [
        (shard, tuple(keys[row] for row in grid.rows_of(shard))) for shard in range(grid.num_shards)
    ]
    cells = np.empty((num_scans, *CELLS), np.uint8)
    arguments = str(writer.path), str(catalogue.survey_folder), config.window_hu
    with progress.stage("join thumbnails", grid.num_shards, "shards") as advance:
        _Rejections(progress, catalogue.reasons())  # those as duplicates, too
        for (shard, _), described in run_bounded(client, join_thumbnails, shards, *arguments):
            raise_if_failed(described)
            cells[grid.rows_of(shard)] = described
            advance(1)
    return cells


# Functions that workers run ----------------------------------------------------------------------


def inspect_header(series: Series, config: PrepareConfig) -> Surveyed:
    """Size and spacing of one series from its headers, or why they reject it."""
    try:
        size, spacing_mm = read_geometry(series, config)
    except Rejected as rejected:
        return Surveyed(key=series.key, reason=rejected.reason, detail=rejected.detail)
    except OSError as error:
        return Surveyed(key=series.key, reason=UNREADABLE, detail=type(error).__name__)
    return Surveyed(key=series.key, size=size, spacing_mm=spacing_mm)


def survey_series(
    series: Series, config: PrepareConfig, survey_folder: str, archive: Sequence[str]
) -> Surveyed:
    """Read one series, and write its thumbnail into the survey folder.

    Raises ArchiveError when the series cannot be read because its archive is gone.
    """
    try:
        with time_limit(config.max_read_seconds):
            volume = read_volume(series, config)
        box = frame_box(volume, config.frame)
        with one_blas_thread():
            thumbnail = make_thumbnail(volume, box, THUMBNAIL_SHAPE, config)
    except Rejected as rejected:
        if rejected.reason == UNREADABLE:
            check_present(archive, series.files[0])
        return Surveyed(key=series.key, reason=rejected.reason, detail=rejected.detail)
    except MemoryError:
        return Surveyed(key=series.key, reason=OUT_OF_MEMORY)
    except OSError as error:
        check_present(archive, series.files[0])
        return Surveyed(key=series.key, reason=UNREADABLE, detail=type(error).__name__)
    except Exception:  # a bug: it costs this series, not the job
        return Surveyed(key=series.key, reason=INTERNAL, detail=traceback.format_exc())
    save_thumbnail(thumbnail_path(Path(survey_folder), series.key), thumbnail)
    return Surveyed(
        key=series.key,
        scan_id=volume.scan_id(),
        spacing_mm=volume.spacing_mm,
        size=volume.hu.shape,
        frame_mm=tuple(tuple(corner) for corner in box.tolist()),
        statistics_hu=mean_and_std(volume.hu),
    )


def save_thumbnail(file: Path, thumbnail: NDArray[np.uint8]) -> None:
    """Write a thumbnail for `join_thumbnails`, encoded as a chunk of the store."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file, shared=True) as partial:  # Dask may run a task twice
        partial.write_bytes(encode_chunk(thumbnail))


def join_thumbnails(
    item: tuple[int, tuple[str, ...]], store: str, survey_folder: str, window_hu: tuple[int, int]
) -> NDArray[np.uint8]:
    """Write one shard of `scans/thumbnail` from the survey's files.

    item
        Number of the shard, and the series keys of its scans.

    Returns (n, 8, 16, 16): what `describe_cells` says of its scans.
    """
    shard, keys = item
    thumbnails = np.empty((len(keys), *THUMBNAIL_SHAPE), np.uint8)
    for thumbnail, key in zip(thumbnails, keys, strict=True):
        if not decode_chunk(thumbnail_path(Path(survey_folder), key).read_bytes(), thumbnail):
            raise SemgenError(
                f"{Path(store).name}: a thumbnail of the survey is damaged; delete the store and"
                " its catalogue and prepare again"
            )
    write_shard(Path(store), "scans/thumbnail", shard, thumbnails)
    with one_blas_thread():
        return np.stack([describe_cells(thumbnail, window_hu) for thumbnail in thumbnails])

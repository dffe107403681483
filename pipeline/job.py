"""The job: from an archive to a complete store, stage by stage; resumes after any interruption.

Workers read, cut and write; this process plans, and holds nothing that grows with the archive but
small tables. What is done is known from what exists: series in the catalogue, stages in the
store's attribute, shards by their checksums.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

from distributed import Client, KilledWorker

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.folders import resolve_archive
from pipeline.archive.lookup import catalogue_folder
from pipeline.archive.manifest import Manifest
from pipeline.cluster import check_scheduler, connect
from pipeline.config import PrepareConfig
from pipeline.preflight import (
    PrepareError,
    check_extension,
    digest_inputs,
    find_job,
    find_state,
    find_weights,
)
from pipeline.stages.cut import cut_crops
from pipeline.stages.seal import seal_store
from pipeline.stages.survey import survey_archive
from pipeline.summary import Summary
from store.atomic import delete_partial_files
from store.errors import check_local
from store.format import SPLITS, StoreError
from store.progress import SILENT, Advance, Progress
from store.reader import PatchStore
from store.settings import to_json
from store.writer import StoreWriter

_SOFTWARE = ("semgen", "numpy", "SimpleITK", "torch", "faiss-cpu", "zarr", "numcodecs")


def prepare(
    archive: str | Path | Sequence[str | Path],
    store: str | Path,
    config: PrepareConfig | None = None,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    manifest: str | Path | None = None,
    autoencoder: str | Path | None = None,
    extend: str | Path | None = None,
    archive_moved: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Prepare a store from an archive, or resume where an interrupted job stopped.

    archive
        One or several folders and files of CT scans.
    config
        Settings; the defaults where None.
    workers
        Number of local worker processes; one for each CPU core where None.
    scheduler
        Address of a running Dask scheduler to use instead; its workers must see the same files.
    manifest
        CSV file that lists which series to use, their patients and splits.
    autoencoder
        Weights to embed with, instead of training: a file, or a store whose weights to use.
    extend
        A complete store of an earlier state of the archive: its survey is used for series that did
        not change. The result is the same as without.
    archive_moved
        The archive that the store was begun with is at `archive` now, its parts in the same order.
        Voxels are compared with the survey when crops are cut.
    progress
        Shows the stages.

    Raises StoreError (the store is something else, has other settings, is of another archive, or
    is in use), PrepareError (no usable series) or ArchiveError (no such file or folder). Nothing
    is left behind when no series is usable.
    """
    check_local(store)
    config = PrepareConfig() if config is None else config
    path = Path(os.path.realpath(store))  # one lock and one catalogue, however it is spelled
    roots = resolve_archive(archive)
    old = None if extend is None else Path(extend)
    if old is not None and os.path.realpath(old) == str(path):
        raise StoreError(f"{path}: is the store to extend; give another folder for the new one")
    weights = None if autoencoder is None else _find_weights(Path(autoencoder))
    listed = None if manifest is None else Path(manifest)
    inputs = digest_inputs(manifest=listed, autoencoder=weights)
    found = find_job(path, roots, config, inputs, archive_moved=archive_moved)
    if found.state == "complete":
        if found.archive_moved:
            with contextlib.closing(Catalogue(catalogue_folder(path))) as catalogue:
                catalogue.move_archive(found.archive)
        return _summarise(path, {}, already_complete=True, archive_checked=found.archive_checked)
    entries = None if listed is None else Manifest(listed, found.archive)
    if old is not None:
        check_extension(old, config)
    if scheduler is not None:
        check_scheduler(scheduler)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    with (
        contextlib.closing(Catalogue(catalogue_folder(path))) as catalogue,
        _failures_explained(catalogue.folder),
    ):
        if find_state(path) != found.state:  # changed before it was locked
            raise StoreError(f"{path}: another prepare was running on it; run again")
        if found.archive_moved:
            catalogue.move_archive(found.archive)
        delete_partial_files(path)
        if found.state is None:
            _begin(path, catalogue, config, inputs, found.archive)
        timed = _Timed(progress or SILENT, catalogue)
        with connect(workers, scheduler, timed) as client:
            usable = _run_stages(
                client,
                StoreWriter(path),
                catalogue,
                config,
                timed,
                archive=found.archive,
                manifest=entries,
                extend=old,
                weights=weights,
            )
        if not usable:
            reasons = ", ".join(f"{n} {reason}" for reason, n in catalogue.reasons().items())
            _remove(path, catalogue.folder, created)
            raise PrepareError(
                f"no usable CT series in the archive ({reasons or 'no images found'})"
            )
        return _summarise(path, catalogue.seconds(), already_complete=False, archive_checked=True)


def _find_weights(autoencoder: Path) -> Path:
    from pipeline.autoencoder import load_autoencoder

    weights = find_weights(autoencoder)
    load_autoencoder(weights)  # better refused now than after the survey
    return weights


def _run_stages(
    client: Client,
    writer: StoreWriter,
    catalogue: Catalogue,
    config: PrepareConfig,
    progress: Progress,
    *,
    archive: list[Path],
    manifest: Manifest | None,
    extend: Path | None,
    weights: Path | None,
) -> bool:
    """Run the stages in their order, each unless it is done; False when no series is usable."""
    from pipeline.stages.discover import check_crops_fit, write_plan
    from pipeline.stages.embed import write_embeddings

    accepted = survey_archive(
        client,
        archive,
        writer,
        catalogue,
        config,
        manifest=manifest,
        extend=extend,
        progress=progress,
    )
    if not accepted:
        return False
    check_crops_fit(PatchStore(writer.path, allow_building=True), config)
    checkpoint = catalogue.autoencoder_checkpoint
    write_embeddings(writer, config, weights=weights, checkpoint=checkpoint, progress=progress)
    write_plan(writer, config, progress)
    planned = PatchStore(writer.path, allow_building=True)
    digests = cut_crops(client, planned, catalogue, config, progress)
    seal_store(writer, catalogue, digests, progress)
    return True


@dataclass(frozen=True, slots=True)
class _Timed:
    """A progress that also records the seconds of each stage in the catalogue."""

    progress: Progress
    catalogue: Catalogue

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        start = time.perf_counter()
        try:
            with self.progress.stage(name, total, unit, done=done) as advance:
                yield advance
        finally:
            with contextlib.suppress(sqlite3.Error):  # a full disk: the stage's own error counts
                self.catalogue.add_seconds(name, time.perf_counter() - start)


def _begin(
    store: Path,
    catalogue: Catalogue,
    config: PrepareConfig,
    inputs: dict[str, str],
    archive: list[Path],
) -> None:
    """Create the store; what remains of a deleted one must not affect it."""
    catalogue.reset()
    catalogue.record_inputs(inputs, to_json(config))
    catalogue.record_archive(archive)
    software = {name: importlib.metadata.version(name) for name in _SOFTWARE}
    StoreWriter.create(store, config=to_json(config), software=software)


@contextlib.contextmanager
def _failures_explained(catalogue: Path) -> Iterator[None]:
    """Failures of disk and cluster as PrepareError."""
    try:
        yield
    except sqlite3.Error as error:
        raise PrepareError(
            f"{catalogue}: {error}; free disk space or check write permission, then run the same"
            " command again to resume"
        ) from error
    except KilledWorker as error:
        raise PrepareError(
            "a worker died several times during one task, most likely for lack of memory;"
            " run again with fewer --workers"
        ) from error
    except CancelledError as error:
        raise PrepareError(
            "lost the Dask scheduler; start it and its workers, and run the same command again"
        ) from error


def _remove(store: Path, catalogue: Path, created: list[Path]) -> None:
    """Delete the content of a store, its catalogue, and the folders that were created for it."""
    for path in store.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(catalogue)
    for folder in created:
        folder.rmdir()


def _summarise(
    path: Path, seconds: dict[str, float], *, already_complete: bool, archive_checked: bool
) -> Summary:
    store = PatchStore(path)
    members = (store.classes.neighbour, store.classes.validation_neighbour)
    return Summary(
        store=path,
        already_complete=already_complete,
        accepted=store.stages["survey"]["accepted"],
        rejected=store.stages["survey"]["rejected"],
        classes=store.num_classes,
        classes_wanted=store.config["classes"],
        members=sum(int((rows >= 0).sum()) for rows in members),
        crops={split: len(store.split(split)) for split in SPLITS},
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        seconds=seconds,
        fingerprint=store.fingerprint or "",
        archive_checked=archive_checked,
    )

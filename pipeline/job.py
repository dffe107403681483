"""The job: from an archive to a complete store, stage by stage; resumes after any interruption.

Workers read, cut and write; this process plans, and its memory grows only by small tables. Progress
is read from the results themselves: series in the catalogue, stages in the store's attribute,
shards by their checksums.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from distributed import Client
from distributed.comm.core import CommClosedError

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.lookup import catalogue_folder
from pipeline.batch import ClusterConfig
from pipeline.cluster import connect, resolve_workers
from pipeline.config import PrepareConfig
from pipeline.errors import PrepareError
from pipeline.isolation import ProcessEnded
from pipeline.place import count_too_small
from pipeline.preflight import Job, check_job, find_state
from pipeline.stages.cut import cut_crops
from pipeline.stages.seal import seal_store
from pipeline.stages.survey import survey_archive
from pipeline.summary import Summary, summarise
from pipeline.tasks import num_threads
from store.atomic import delete_partial_files
from store.format import StoreError
from store.progress import SILENT, Advance, Progress, show_note, show_tally
from store.quality import load_quality
from store.reader import PatchStore
from store.settings import to_json
from store.writer import StoreWriter

_DEFAULTS: Final = PrepareConfig()
_STAGES: Final = (
    ("list series",),
    ("reuse survey", "survey"),
    ("join thumbnails",),
    ("near-duplicates",),
    ("embed",),
    ("discover",),
    ("check shards", "cut"),
    ("seal",),
    ("quality",),
)
"""Names of the stages as they are shown, by number."""
_SOFTWARE = ("semgen", "numpy", "SimpleITK", "torch", "faiss-cpu", "zarr", "numcodecs")
_log = logging.getLogger(__name__)


def prepare(
    archive: str | Path | Sequence[str | Path],
    store: str | Path,
    config: PrepareConfig = _DEFAULTS,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    scheduler_file: str | Path | None = None,
    cluster: ClusterConfig | str | Path | None = None,
    manifest: str | Path | None = None,
    autoencoder: str | Path | None = None,
    extend: str | Path | None = None,
    archive_moved: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Prepare a store from an archive, or resume where an interrupted job stopped.

    archive
        One or several folders and files of CT scans.
    workers
        Number of local worker processes; one for each CPU core where None.
    scheduler
        Address of a running Dask scheduler to use instead; its workers must see the same files.
    scheduler_file
        File with such an address, as `dask scheduler --scheduler-file` writes it.
    cluster
        Settings of a batch system whose jobs are the workers, or a TOML file of them.
    manifest
        CSV file that lists which series to use, their patients and splits.
    autoencoder
        Weights to embed with, instead of training: a file, or a store whose weights to use.
    extend
        A complete store of an earlier state of the archive: its survey is used for series that did
        not change. The result is the same as without.
    archive_moved
        The archive that the store was started with is at `archive` now, its folders and files in
        the same order. Voxels are compared with the survey when crops are cut.
    progress
        Shows the stages.

    Raises StoreError (the store is something else, has other settings, is of another archive, or
    is in use), PrepareError (no usable series) or ArchiveError (no such file or folder). Nothing
    is left behind when no series is usable.
    """
    job = check_job(
        archive,
        store,
        config,
        manifest=manifest,
        autoencoder=autoencoder,
        extend=extend,
        archive_moved=archive_moved,
    )
    if job.state == "complete":
        if job.archive_moved:
            with contextlib.closing(Catalogue(catalogue_folder(job.path))) as catalogue:
                catalogue.move_archive(job.archive)
        return summarise(job.name, {}, already_complete=True, archive_checked=job.archive_checked)
    scheduler, jobs = resolve_workers(
        workers=workers, scheduler=scheduler, scheduler_file=scheduler_file, cluster=cluster
    )
    created = [folder for folder in (job.path, *job.path.parents) if not folder.exists()]
    with (
        contextlib.closing(Catalogue(catalogue_folder(job.path))) as catalogue,
        _failures_explained(catalogue.folder),
    ):
        _begin(job, catalogue)
        timed = _Staged(progress or SILENT, catalogue)
        folder = catalogue.folder
        with connect(workers, scheduler, timed, cluster=jobs, folder=folder) as client:
            _log.info("processes that work: %d", num_threads(client))
            usable = _run_stages(client, job, catalogue, timed)
        if not usable:
            reasons = ", ".join(f"{n} {reason}" for reason, n in catalogue.reasons().items())
            _remove(job.path, catalogue.folder, created)
            raise PrepareError(
                f"no usable CT series in the archive ({reasons or 'no images found'});"
                " semgen prepare ... --dry-run shows why"
            )
        made = PatchStore(job.path)
        quality = load_quality(made, progress=timed)
        return summarise(
            job.name,
            catalogue.seconds(),
            already_complete=False,
            archive_checked=True,
            quality=quality,
            too_small=count_too_small(made, job.config),
        )


def _begin(job: Job, catalogue: Catalogue) -> None:
    """Create the store, or make the unfinished one ready to be continued."""
    if find_state(job.path) != job.state:  # changed before it was locked
        raise StoreError(
            f"{job.path}: another `semgen prepare` changed this store; run the same command again"
        )
    if job.archive_moved:
        catalogue.move_archive(job.archive)
    delete_partial_files(job.path)
    if job.state is None:
        catalogue.reset()  # what remains of a deleted store must not affect this one
        catalogue.record_inputs(job.inputs, to_json(job.config))
        catalogue.record_archive(job.archive)
        software = {name: importlib.metadata.version(name) for name in _SOFTWARE}
        StoreWriter.create(job.path, config=to_json(job.config), software=software)


def _run_stages(client: Client, job: Job, catalogue: Catalogue, progress: Progress) -> bool:
    """Run the stages in order, each unless it is done; False when no series is usable."""
    writer, config = StoreWriter(job.path), job.config
    if writer.stages:
        show_note(progress, f"resuming; done by an earlier run: {', '.join(writer.stages)}")
    accepted = survey_archive(
        client,
        job.archive,
        writer,
        catalogue,
        config,
        manifest=job.manifest,
        extend=job.extend,
        progress=progress,
    )
    if not accepted:
        return False
    from pipeline.stages.discover import check_crops_fit, write_plan
    from pipeline.stages.embed import write_embeddings

    check_crops_fit(PatchStore(job.path, allow_building=True), config)
    checkpoint = catalogue.autoencoder_checkpoint
    write_embeddings(writer, config, weights=job.weights, checkpoint=checkpoint, progress=progress)
    write_plan(client, writer, catalogue, config, progress)
    planned = PatchStore(job.path, allow_building=True)
    digests = cut_crops(client, planned, catalogue, config, progress)
    seal_store(writer, catalogue, digests, progress)
    return True


@dataclass(frozen=True, slots=True)
class _Staged:
    """A progress that numbers the stages, and records their seconds in the catalogue."""

    progress: Progress
    catalogue: Catalogue

    def note(self, text: str) -> None:
        show_note(self.progress, text)

    def tally(self, text: str) -> None:
        show_tally(self.progress, text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        number = next(n for n, names in enumerate(_STAGES, 1) if name in names)
        shown, start = f"{number} of {len(_STAGES)}: {name}", time.perf_counter()
        try:
            with self.progress.stage(shown, total, unit, done=done) as advance:
                yield advance
        finally:
            with contextlib.suppress(sqlite3.Error):  # a full disk: the stage's own error counts
                self.catalogue.add_seconds(name, time.perf_counter() - start)


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
    except ProcessEnded as error:
        raise PrepareError(
            f"a task cannot be done: {error}; run the same command again, with more memory for each"
            " worker (fewer --workers) if it was killed"
        ) from error
    except (CancelledError, CommClosedError) as error:
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

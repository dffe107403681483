"""The job: an archive becomes a sealed store, stage by stage, resumable at any moment.

Workers do the reading, cutting and writing; this process plans, and holds nothing that grows
with the archive but small tables. What is finished is known from what lies there: series in the
catalogue, stages in the store's attribute, shards by their checksums.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from distributed import Client, KilledWorker

from pipeline.archive.catalogue import Catalogue, catalogue_folder
from pipeline.archive.manifest import Manifest
from pipeline.cluster import check_scheduler, connect, num_threads, raise_if_failed, run_bounded
from pipeline.config import PrepareConfig
from pipeline.preflight import (
    PrepareError,
    check_crops_fit,
    check_extension,
    digest_inputs,
    find_job,
    find_state,
    find_weights,
    resolve_archive,
)
from pipeline.stages.cut import ScanCut, check_shards, cut_scan, finish_shard
from pipeline.stages.survey import Survey
from store.atomic import delete_partial_files
from store.errors import check_local
from store.format import AUTOENCODER_FILE, SPLITS, StoreError
from store.reader import PatchStore, ShardedReader
from store.settings import to_json
from store.writer import StoreWriter

if TYPE_CHECKING:
    from pipeline.autoencoder import Autoencoder

_SOFTWARE = ("semgen", "numpy", "SimpleITK", "torch", "faiss-cpu", "zarr", "numcodecs")
_SHARDS_PER_CHECK = 16


class Reporter(Protocol):
    """How the job tells of its progress."""

    def stage(
        self, name: str, total: int | None, unit: str, *, done: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Enter a stage of `total` units; the value advances it by so many.

        done
            Units that an earlier run did.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a finished job made. `seconds` are those of all runs, by stage."""

    already_complete: bool
    accepted: int
    rejected: dict[str, int]
    classes: int
    classes_wanted: int
    members: int
    crops: dict[str, int]
    bytes: int
    seconds: dict[str, float]
    fingerprint: str
    archive_checked: bool
    """Whether the archive is known to be the store's; not where the catalogue is missing."""


def prepare(
    archive: Sequence[Path],
    store: Path,
    config: PrepareConfig,
    *,
    workers: int,
    reporter: Reporter,
    scheduler: str | None = None,
    autoencoder: Path | None = None,
    manifest: Path | None = None,
    extend: Path | None = None,
    archive_moved: bool = False,
) -> Summary:
    """Make the store, or finish one that was begun.

    workers, scheduler
        Processes of a local cluster, or the address of a running one whose workers see the same
        file system.
    autoencoder
        Weights to embed with, instead of training: a file, or a store whose weights to take.
    manifest
        CSV file that says which series to use, whose they are, and for which split.
    extend
        A complete store of an archive that has grown since: what its survey found of series that
        did not change is used again. The result is the same as without.
    archive_moved
        The archive that the store was begun with lies at `archive` now, its parts in the same
        order. Voxels are checked against the survey when crops are cut.

    Raises StoreError (the store is something else, other settings, another archive, in use),
    PrepareError (no usable series) or ArchiveError (no such file or folder). Nothing is left
    behind when no series is usable.
    """
    check_local(store)
    store = Path(os.path.realpath(store))  # one lock and one catalogue, however it is spelled
    archive = resolve_archive(archive)
    if extend is not None and os.path.realpath(extend) == str(store):
        raise StoreError(f"{store}: is the store to extend; give another folder for the new one")
    if autoencoder is not None:
        autoencoder = find_weights(autoencoder)
        _load_autoencoder(autoencoder)  # better now than after the survey
    inputs = digest_inputs(manifest=manifest, autoencoder=autoencoder)
    found = find_job(store, archive, config, inputs, archive_moved=archive_moved)
    archive = found.archive
    if found.state == "complete":
        if found.archive_moved:
            with contextlib.closing(Catalogue(catalogue_folder(store))) as catalogue:
                catalogue.move_archive(archive)
        return _summarise(store, {}, already_complete=True, archive_checked=found.archive_checked)
    listed = Manifest(manifest, archive) if manifest else None
    if extend is not None:
        check_extension(extend, config)
    if scheduler is not None:
        check_scheduler(scheduler)
    made = [path for path in (store, *store.parents) if not path.exists()]
    with (
        contextlib.closing(Catalogue(catalogue_folder(store))) as catalogue,
        _failures_explained(catalogue.folder),
    ):
        if find_state(store) != found.state:  # changed before it was locked
            raise StoreError(f"{store}: another prepare was at work on it; run again")
        if found.archive_moved:
            catalogue.move_archive(archive)
        delete_partial_files(store)
        if found.state is None:
            catalogue.reset()  # what is left of a deleted store must not shape this one
            catalogue.note_inputs(inputs, to_json(config))
            catalogue.note_archive(archive)
            software = {name: importlib.metadata.version(name) for name in _SOFTWARE}
            StoreWriter.create(store, config=to_json(config), software=software)
        job = _Job(StoreWriter(store), catalogue, config, autoencoder, reporter)
        survey = Survey(
            archive,
            job.writer,
            catalogue,
            config,
            manifest=listed,
            extend=extend,
            stage=job.stage,
        )
        with connect(workers, scheduler, reporter.stage) as client:
            usable = survey.run(client)
            if usable:
                check_crops_fit(PatchStore(store, allow_building=True), config)
                job.embed()
                job.discover()
                job.seal(job.cut(client))
        if not usable:
            reasons = ", ".join(f"{n} {reason}" for reason, n in catalogue.reasons().items())
            _remove(store, catalogue.folder, made)
            raise PrepareError(
                f"no usable CT series in the archive ({reasons or 'no images found'})"
            )
        return _summarise(store, catalogue.seconds(), already_complete=False, archive_checked=True)


@contextlib.contextmanager
def _failures_explained(folder: Path) -> Iterator[None]:
    """What happens to a job from outside, as PrepareError; `folder` is the catalogue's."""
    try:
        yield
    except sqlite3.Error as error:
        raise PrepareError(
            f"{folder}: {error}; free disk space or check write permission, then run the same"
            " command again to resume"
        ) from error
    except KilledWorker as error:
        raise PrepareError(
            "a worker died several times over one task, most likely for lack of memory;"
            " run again with fewer --workers"
        ) from error
    except CancelledError as error:
        raise PrepareError(
            "lost the Dask scheduler; start it and its workers, and run the same command again"
        ) from error


def _remove(store: Path, catalogue: Path, made: list[Path]) -> None:
    """Delete a store and its catalogue, and those folders that were `made` for it."""
    for path in store.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(catalogue)
    for folder in made:
        folder.rmdir()


def _load_autoencoder(file: Path) -> Autoencoder:
    from pipeline.stages.embed import load_autoencoder  # torch takes long to import

    return load_autoencoder(file)


class _Job:
    """One run of `prepare`: the stages in order, each skipped when it is done."""

    def __init__(
        self,
        writer: StoreWriter,
        catalogue: Catalogue,
        config: PrepareConfig,
        autoencoder: Path | None,
        reporter: Reporter,
    ) -> None:
        self.writer = writer
        self.path = writer.path
        self.catalogue = catalogue
        self.config = config
        self.autoencoder = autoencoder
        self.reporter = reporter

    @contextlib.contextmanager
    def stage(
        self, name: str, total: int | None, unit: str, *, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        """Tell of a stage, and keep the time it took."""
        begun = time.perf_counter()
        try:
            with self.reporter.stage(name, total, unit, done=done) as advance:
                yield advance
        finally:
            with contextlib.suppress(sqlite3.Error):  # a full disk: the stage's own error counts
                self.catalogue.add_seconds(name, time.perf_counter() - begun)

    # embed and discover ---------------------------------------------------------------------

    def embed(self) -> None:
        """Train or load the autoencoder, write embeddings."""
        if "embed" in self.writer.stages:
            return
        import torch

        from pipeline.stages import embed

        settings = self.config.autoencoder
        torch.set_num_threads(settings.threads)
        read = ShardedReader(self.path, "scans/thumbnail").read
        split = PatchStore(self.path, allow_building=True).scans.split
        train, held_out = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
        epoch_steps = -(-len(train) // settings.batch_size)
        most = min(settings.max_steps, settings.max_epochs * epoch_steps)
        facts: dict[str, Any] = {}
        if self.autoencoder is not None:
            with self.stage("embed", len(split), "scans") as advance:
                model = _load_autoencoder(self.autoencoder)
                embedding = embed.embed(model, read, len(split), progress=advance)
        else:
            checkpoint = self.catalogue.autoencoder_checkpoint
            done = embed.steps_done(checkpoint)
            with self.stage("embed", most, "steps", done=done) as advance:
                model, training = embed.train_autoencoder(
                    read,
                    train=train,
                    held_out=held_out,
                    config=settings,
                    seed=self.config.seed,
                    checkpoint=checkpoint,
                    progress=lambda steps, _: advance(steps),
                )
                embedding = embed.embed(model, read, len(split))
            facts = {
                "epochs": training.epochs,
                "loss": training.loss,
                "held_out_loss": training.held_out_loss,
            }
        self.writer.write_table("scans/embedding", embedding)
        embed.save_autoencoder(model, self.path / AUTOENCODER_FILE)
        self.writer.finish_stage("embed", facts)

    def discover(self) -> None:
        """Plan classes and rows; write all of it before any crop is cut."""
        if "discover" in self.writer.stages:
            return
        from pipeline.stages import discover as discovery

        store = PatchStore(self.path, allow_building=True)
        thumbnails = store.thumbnails
        scans = discovery.Scans(
            split=store.scans.split,
            spacing_mm=store.scans.spacing_mm,
            size=store.scans.size,
            frame_mm=store.scans.frame_mm,
            embedding=store.scans.embedding,
            thumbnail=lambda row: np.asarray(thumbnails.read([row])[0]),
        )
        with self.stage("discover", self.config.classes, "classes") as advance:
            classes = discovery.discover(scans, self.config, progress=advance)
            if not classes:
                raise PrepareError(
                    f"no class found in {len(scans)} scans: no scan holds a crop of"
                    f" {self.config.shape} at {self.config.spacing_mm} mm that enough others hold"
                    f" too; delete {self.path} and try smaller crops or other tissue limits"
                )
            for name, values in discovery.class_tables(classes, self.config).items():
                self.writer.write_table(f"classes/{name}", values)
            for number, split in enumerate(SPLITS):
                rows = discovery.row_tables(classes, scans, self.config, number)
                for name, values in rows.items():
                    self.writer.write_table(f"{split}/{name}", values)
                self.writer.create_sharded(
                    f"{split}/patch",
                    shape=(len(rows["label"]), *self.config.shape),
                    dtype="int16",
                    rows_per_shard=self.config.rows_per_shard,
                )
        self.writer.finish_stage("discover", {"classes": len(classes)})

    # cut and seal ---------------------------------------------------------------------------

    def cut(self, client: Client) -> dict[str, list[str]]:
        """Cut every crop that is not there yet; returns the shards' digests by array."""
        store = PatchStore(self.path, allow_building=True)
        grids = {"scans/thumbnail": store.thumbnails.grid}
        grids |= {f"{split}/patch": store.split(split).patch.grid for split in SPLITS}
        digests: dict[str, list[str | None]] = {n: [None] * g.num_shards for n, g in grids.items()}
        batches = [
            (name, tuple(range(grid.num_shards)[start : start + _SHARDS_PER_CHECK]))
            for name, grid in grids.items()
            for start in range(0, grid.num_shards, _SHARDS_PER_CHECK)
        ]
        with self.stage("check", len(batches), "batches") as advance:
            for (name, shards), found in run_bounded(client, check_shards, batches, str(self.path)):
                raise_if_failed(found)
                digests[name][shards[0] : shards[-1] + 1] = found
                advance(1)
        if None in digests["scans/thumbnail"]:
            raise PrepareError(
                f"{self.path}: thumbnails that were written are now damaged; delete the store and"
                " prepare again"
            )
        total = sum(
            len(grids[f"{split}/patch"].rows_of(shard))
            for split in SPLITS
            for shard, digest in enumerate(digests[f"{split}/patch"])
            if digest is None
        )
        with self.stage("cut", total, "crops") as advance:
            for split in SPLITS:
                self._cut_split(client, store, split, digests[f"{split}/patch"], advance)
        return {name: [d for d in found if d is not None] for name, found in digests.items()}

    def _cut_split(
        self,
        client: Client,
        store: PatchStore,
        split: str,
        digests: list[str | None],
        advance: Callable[[int], None],
    ) -> None:
        """Cut the missing shards of one split, in row order.

        A scan is read by one task for all its crops; that task writes the shards that are its
        own alone, and hands its share of the others on to the task that writes them.
        """
        rows = store.split(split)
        grid = rows.patch.grid
        missing = [shard for shard in range(grid.num_shards) if digests[shard] is None]
        limit = 2 * num_threads(client)  # of shards and of scans in flight
        cuts: dict[int, Any] = {}  # futures, by scan
        in_flight: deque[tuple[int, Any]] = deque()  # shard and future

        def collect() -> None:
            shard, future = in_flight.popleft()
            digests[shard] = future.result()
            advance(len(grid.rows_of(shard)))

        for shard in missing:
            of_shard = grid.rows_of(shard)
            scans = np.unique(rows.scan[of_shard.start : of_shard.stop]).tolist()
            cuts = {scan: future for scan, future in cuts.items() if scan in scans}
            for scan in scans:
                if scan not in cuts:
                    first, stop = np.searchsorted(rows.scan, [scan, scan + 1]).tolist()
                    job = ScanCut(
                        series=self.catalogue.scan_series(scan),
                        scan_id=int(store.scans.id[scan]),
                        split=split,
                        first_row=first,
                        origin_mm=rows.origin_mm[first:stop],
                        extent_mm=rows.extent_mm[first:stop],
                        shards=tuple(
                            s for s in grid.shards_of(range(first, stop)) if digests[s] is None
                        ),
                    )
                    cuts[scan] = client.submit(
                        cut_scan,
                        str(self.path),
                        job,
                        self.config,
                        key=f"cut-{split}-{scan}",
                        pure=False,
                    )
            done = client.submit(
                finish_shard,
                str(self.path),
                split,
                shard,
                [cuts[scan] for scan in scans],
                key=f"finish-{split}-{shard}",
                pure=False,
            )
            in_flight.append((shard, done))
            oldest = grid.rows_of(in_flight[0][0]).start
            if (
                len(in_flight) >= limit
                and len(np.unique(rows.scan[oldest : of_shard.stop])) > limit
            ):
                collect()
        while in_flight:
            collect()

    def seal(self, digests: dict[str, list[str]]) -> None:
        """Fix the fingerprint; the store is complete."""
        with self.stage("seal", 1, "store") as advance:
            delete_partial_files(self.path)
            self.writer.seal(digests)
            self.catalogue.tidy()
            advance(1)


def _summarise(
    store: Path, seconds: dict[str, float], *, already_complete: bool, archive_checked: bool
) -> Summary:
    done = PatchStore(store)
    stages = done.stages
    return Summary(
        already_complete=already_complete,
        accepted=stages["survey"]["accepted"],
        rejected=stages["survey"]["rejected"],
        classes=done.num_classes,
        classes_wanted=done.config["classes"],
        members=int(
            (done.classes.neighbour >= 0).sum() + (done.classes.validation_neighbour >= 0).sum()
        ),
        crops={split: len(done.split(split)) for split in SPLITS},
        bytes=sum(file.stat().st_size for file in store.rglob("*") if file.is_file()),
        seconds=seconds,
        fingerprint=done.fingerprint or "",
        archive_checked=archive_checked,
    )

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
import tempfile
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

from pipeline.archive import CRASHED, crashed_folder, find_folders, read_folder
from pipeline.catalogue import (
    Catalogue,
    Surveyed,
    catalogue_folder,
    read_rejections,
    thumbnail_path,
)
from pipeline.cluster import connect, num_threads, run_bounded
from pipeline.config import PrepareConfig, differences
from pipeline.manifest import Manifest
from pipeline.tasks import (
    ScanCut,
    check_shards,
    collect_thumbnails,
    cut_scan,
    finish_shard,
    save_thumbnail,
    survey_series,
)
from store.format import AUTOENCODER_FILE, SPLITS, THUMBNAIL_SHAPE, StoreError
from store.reader import PatchStore, ShardedReader
from store.writer import StoreWriter, sweep

if TYPE_CHECKING:
    from pipeline.autoencoder import Autoencoder

_SOFTWARE = ("semgen", "numpy", "SimpleITK", "torch", "faiss-cpu", "zarr", "numcodecs")
_SHARDS_PER_CHECK = 16
_SURVEY_SETTINGS = (
    "frame",
    "window_hu",
    "min_slices",
    "max_voxels",
    "max_oblique_deg",
    "spacing_tolerance",
)
"""Settings that decide which series are accepted and what the survey notes of them."""


class PrepareError(ValueError):
    """The job cannot go on; the message says why and what to do."""


class Reporter(Protocol):
    """How the job tells of its progress."""

    def stage(
        self, name: str, total: int | None, unit: str
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Enter a stage of `total` units; the value advances it by so many."""


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

    Raises StoreError (the store is something else, other settings, in use), PrepareError (no
    usable series) or FileNotFoundError (archive). Nothing is left behind when no series is
    usable.
    """
    archive = [Path(os.path.abspath(path)) for path in archive]  # workers may be elsewhere
    for path in archive:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    if extend is not None and extend.resolve() == store.resolve():
        raise StoreError(f"{store}: is the store to extend; give another folder for the new one")
    fresh = not store.exists() or (store.is_dir() and not any(_but_strays(store)))
    if not fresh:
        existing = PatchStore(store, allow_building=True)
        _check_settings(existing, config)
        if existing.state == "complete":
            return _summarise(store, {}, already_complete=True)
    if autoencoder is not None:
        _load_autoencoder(autoencoder)  # better now than after the survey
    listed = Manifest(manifest, archive) if manifest else None
    if extend is not None:
        _check_extension(extend, config)
    made = [parent for parent in store.absolute().parents if not parent.exists()]
    with (
        contextlib.closing(Catalogue(catalogue_folder(store))) as catalogue,
        _failures_explained(catalogue.folder),
    ):
        sweep(store)
        if fresh:
            catalogue.reset()  # what is left of a deleted store must not shape this one
            software = {name: importlib.metadata.version(name) for name in _SOFTWARE}
            StoreWriter.create(store, config=config.to_json(), software=software)
        job = _Job(
            archive, StoreWriter(store), catalogue, config, autoencoder, listed, extend, reporter
        )
        with connect(workers, scheduler) as client:
            usable = job.survey(client)
            if usable:
                job.embed()
                job.discover()
                job.seal(job.cut(client))
        if not usable:
            reasons = ", ".join(f"{n} {reason}" for reason, n in catalogue.reasons().items())
            _remove(store, catalogue.folder, made)
            raise PrepareError(
                f"no usable CT series in the archive ({reasons or 'no images found'})"
            )
        return _summarise(store, catalogue.seconds(), already_complete=False)


@contextlib.contextmanager
def _failures_explained(folder: Path) -> Iterator[None]:
    """What happens to a job from outside, as PrepareError; `folder` is the catalogue's."""
    try:
        yield
    except sqlite3.Error as error:
        raise PrepareError(
            f"{folder}: {error}; make room or give the right to write, and run again"
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


def _check_settings(store: PatchStore, config: PrepareConfig) -> None:
    changed = differences(config.to_json(), store.config)
    if changed:
        raise StoreError(
            f"{store.path}: begun with other settings ({'; '.join(changed)});"
            " use those, or give another folder"
        )


def _remove(store: Path, catalogue: Path, made: list[Path]) -> None:
    """Take back a store and its catalogue, and the folders above it that were made for it."""
    shutil.rmtree(store)
    shutil.rmtree(catalogue)
    for parent in made:
        parent.rmdir()


def _check_extension(old: Path, config: PrepareConfig) -> None:
    """StoreError unless the survey of `old` is what a survey under these settings would find."""
    read_rejections(old)  # StoreError without its private catalogue
    theirs = PatchStore(old).config
    changed = differences(
        {name: config.to_json()[name] for name in _SURVEY_SETTINGS},
        {name: theirs[name] for name in _SURVEY_SETTINGS},
    )
    if changed:
        raise StoreError(f"{old}: surveyed with other settings ({'; '.join(changed)})")


def list_series(
    archive: Sequence[Path], config: PrepareConfig, manifest: Path | None
) -> Iterator[tuple[str, int, str | None, str]]:
    """What `prepare` would do with each series, from headers alone; nothing is left behind.

    Yields (first file, number of files, reason to reject it or None, detail).
    """
    listed = Manifest(manifest, archive) if manifest else None
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.closing(Catalogue(Path(scratch) / "catalogue")) as catalogue,
    ):
        for folder in find_folders(archive):
            found = read_folder(folder, config)
            catalogue.add(listed.apply(found) if listed else found)
        if config.one_per_study:
            catalogue.choose()
        yield from catalogue.listing()


def _but_strays(store: Path) -> Iterator[Path]:
    """What lies in a folder, but for what a kill during the store's creation leaves."""
    return (
        path
        for path in store.iterdir()
        if not (path.name.startswith("zarr.") and path.suffix == ".partial")
    )


def _load_autoencoder(file: Path) -> Autoencoder:
    """Weights from a file, or those of a store."""
    from pipeline.embed import load_autoencoder

    return load_autoencoder(file / AUTOENCODER_FILE if file.is_dir() else file)


class _Job:
    """One run of `prepare`: the stages in order, each skipped when it is done."""

    def __init__(
        self,
        archive: Sequence[Path],
        writer: StoreWriter,
        catalogue: Catalogue,
        config: PrepareConfig,
        autoencoder: Path | None,
        manifest: Manifest | None,
        extend: Path | None,
        reporter: Reporter,
    ) -> None:
        self.archive = archive
        self.writer = writer
        self.path = writer.path
        self.catalogue = catalogue
        self.config = config
        self.autoencoder = autoencoder
        self.manifest = manifest
        self.extend = extend
        self.reporter = reporter

    @contextlib.contextmanager
    def _stage(self, name: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        begun = time.perf_counter()
        try:
            with self.reporter.stage(name, total, unit) as advance:
                yield advance
        finally:
            with contextlib.suppress(sqlite3.Error):  # a full disk: the stage's own error counts
                self.catalogue.add_seconds(name, time.perf_counter() - begun)

    # catalogue and survey -----------------------------------------------------------------

    def survey(self, client: Client) -> int:
        """List the series, read each once, lay the scans out; returns how many are accepted."""
        if "survey" in self.writer.stages:
            return int(self.writer.stages["survey"]["accepted"])
        folders = list(find_folders(self.archive))
        with self._stage("catalogue", len(folders), "folders") as advance:
            for folder, found in run_bounded(client, read_folder, folders, self.config):
                crashed = isinstance(found, BaseException)
                series = [crashed_folder(folder)] if crashed else found
                self.catalogue.add(self.manifest.apply(series) if self.manifest else series)
                advance(1)
            self.catalogue.commit()
        while True:
            if self.config.one_per_study:
                self.catalogue.choose()
            if self.extend is not None:
                self._reuse_survey(self.extend)
            self._read_pending(client)
            if not self.catalogue.choose_again():
                break
        self.catalogue.reject_duplicates()
        accepted = self.catalogue.number_scans()
        if accepted:
            self._lay_out_scans(client, accepted)
            self.writer.finish_stage(
                "survey", {"accepted": accepted, "rejected": self.catalogue.reasons()}
            )
        return accepted

    def _reuse_survey(self, store: Path) -> None:
        thumbnails = PatchStore(store).thumbnails
        with self._stage("reuse", None, "scans") as advance:
            for surveyed, row in self.catalogue.known_from(store):
                if row is not None:
                    file = thumbnail_path(self.catalogue.survey_folder, surveyed.key)
                    save_thumbnail(file, thumbnails.read([row])[0])
                self.catalogue.record(surveyed)
                advance(1)
            self.catalogue.commit()

    def _read_pending(self, client: Client) -> None:
        pending = self.catalogue.count("reason IS NULL AND scan_id IS NULL")
        with self._stage("survey", pending, "scans") as advance:
            for series, found in run_bounded(
                client,
                survey_series,
                self.catalogue.pending(),
                self.config,
                str(self.catalogue.survey_folder),
            ):
                crashed = isinstance(found, BaseException)
                self.catalogue.record(
                    Surveyed(key=series.key, reason=CRASHED) if crashed else found
                )
                advance(1)
            self.catalogue.commit()

    def _lay_out_scans(self, client: Client, num_scans: int) -> None:
        from pipeline.discovery import split_persons

        tables = self.catalogue.scan_tables()
        tables["patient"], tables["split"] = split_persons(
            tables.pop("person"), self.config, tables.pop("wanted_split")
        )
        for name, values in tables.items():
            self.writer.write_table(f"scans/{name}", values)
        name = "scans/thumbnail"
        grid = self.writer.create_sharded(
            name,
            shape=(num_scans, *THUMBNAIL_SHAPE),
            dtype="uint8",
            rows_per_shard=self.config.rows_per_shard,
        )
        keys = self.catalogue.scan_keys()
        shards = [
            (shard, tuple(keys[row] for row in grid.rows_of(shard)))
            for shard in range(grid.num_shards)
        ]
        folder = str(self.catalogue.survey_folder)
        with self._stage("collect", grid.num_shards, "shards") as advance:
            for _, done in run_bounded(client, collect_thumbnails, shards, str(self.path), folder):
                _raise_if_failed(done)
                advance(1)

    # embed and discover ---------------------------------------------------------------------

    def embed(self) -> None:
        """Train or load the autoencoder, write embeddings."""
        if "embed" in self.writer.stages:
            return
        import torch

        from pipeline import embed

        settings = self.config.autoencoder
        torch.set_num_threads(settings.threads)
        read = ShardedReader(self.path, "scans/thumbnail").read
        split = PatchStore(self.path, allow_building=True).scans.split
        train, held_out = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
        epoch_steps = -(-len(train) // settings.batch_size)
        most = min(settings.max_steps, settings.max_epochs * epoch_steps)
        facts: dict[str, Any] = {}
        with self._stage("embed", None if self.autoencoder else most, "steps") as advance:
            if self.autoencoder is not None:
                model = _load_autoencoder(self.autoencoder)
            else:
                model, training = embed.train_autoencoder(
                    read,
                    train=train,
                    held_out=held_out,
                    config=settings,
                    seed=self.config.seed,
                    checkpoint=self.catalogue.autoencoder_checkpoint,
                    progress=lambda steps, _: advance(steps),
                )
                facts = {
                    "epochs": training.epochs,
                    "loss": training.loss,
                    "held_out_loss": training.held_out_loss,
                }
            self.writer.write_table("scans/embedding", embed.embed(model, read, len(split)))
            embed.save_autoencoder(model, self.path / AUTOENCODER_FILE)
        self.writer.finish_stage("embed", facts)

    def discover(self) -> None:
        """Plan classes and rows; write all of it before any crop is cut."""
        if "discover" in self.writer.stages:
            return
        from pipeline import discovery

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
        with self._stage("discover", self.config.classes, "classes") as advance:
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
        with self._stage("check", len(batches), "batches") as advance:
            for (name, shards), found in run_bounded(client, check_shards, batches, str(self.path)):
                _raise_if_failed(found)
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
        with self._stage("cut", total, "crops") as advance:
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
        with self._stage("seal", None, "stores"):
            sweep(self.path)
            self.writer.seal(digests)
            self.catalogue.tidy()


def _raise_if_failed(result: Any) -> None:
    if isinstance(result, BaseException):
        raise result


def _summarise(store: Path, seconds: dict[str, float], *, already_complete: bool) -> Summary:
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
    )

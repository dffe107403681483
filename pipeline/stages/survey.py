"""The first stages of a job: list an archive's series, read each once, lay the scans out."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from distributed import Client

from pipeline.archive.catalogue import Catalogue, Surveyed, thumbnail_path
from pipeline.archive.manifest import Manifest, taken
from pipeline.archive.series import (
    CRASHED,
    crashed_folder,
    find_folders,
    join_parts,
    read_folder,
)
from pipeline.cluster import Stage, raise_if_failed, run_bounded
from pipeline.config import PrepareConfig
from pipeline.preflight import resolve_archive
from pipeline.stages.cut import collect_thumbnails, save_thumbnail, survey_series
from pipeline.stages.discover import split_persons
from store.format import SURVEY_VERSION, THUMBNAIL_SHAPE
from store.reader import PatchStore
from store.writer import StoreWriter


def list_series(
    archive: Sequence[Path], config: PrepareConfig, manifest: Path | None
) -> Iterator[tuple[str, int, str | None, str]]:
    """What `prepare` would do with each series, from headers alone; nothing is left behind.

    Yields (first file, number of files, reason to reject it or None, detail).
    """
    archive = resolve_archive(archive)
    listed = Manifest(manifest, archive) if manifest else None
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.closing(Catalogue(Path(scratch) / "catalogue")) as catalogue,
    ):
        for folder in find_folders(archive):
            found = read_folder(folder, config)
            catalogue.add(listed.apply(found) if listed else found)
        for parts in catalogue.spread():
            catalogue.add(taken(parts, join_parts(parts, config)), again=True)
        if listed:
            catalogue.add(listed.unused())
        if config.one_per_study:
            catalogue.choose()
        yield from catalogue.listing()


class Survey:
    """From the archive to the tables of `scans`, all but the embeddings."""

    def __init__(
        self,
        archive: Sequence[Path],
        writer: StoreWriter,
        catalogue: Catalogue,
        config: PrepareConfig,
        *,
        manifest: Manifest | None,
        extend: Path | None,
        stage: Stage,
    ) -> None:
        self.archive = archive
        self.writer = writer
        self.catalogue = catalogue
        self.config = config
        self.manifest = manifest
        self.extend = extend
        self.stage = stage

    def run(self, client: Client) -> int:
        """Do what is not done yet; returns how many scans are accepted."""
        if "survey" in self.writer.stages:
            return int(self.writer.stages["survey"]["accepted"])
        self._list_series(client)
        while True:
            if self.config.one_per_study:
                self.catalogue.choose()
            if self.extend is not None:
                self._reuse(self.extend)
            self._read_pending(client)
            if not self.catalogue.choose_again():
                break
        self.catalogue.reject_duplicates()
        accepted = self.catalogue.number_scans()
        if accepted:
            self._lay_out_scans(client, accepted)
            self.writer.finish_stage(
                "survey",
                {
                    "accepted": accepted,
                    "rejected": self.catalogue.reasons(),
                    "version": SURVEY_VERSION,
                },
            )
        return accepted

    def _list_series(self, client: Client) -> None:
        # walked twice: the names of all files of a large archive would not fit into memory
        num_folders = sum(1 for _ in find_folders(self.archive))
        with self.stage("catalogue", num_folders, "folders") as advance:
            folders = find_folders(self.archive)
            for folder, found in run_bounded(client, read_folder, folders, self.config):
                crashed = isinstance(found, BaseException)
                series = [crashed_folder(folder)] if crashed else found
                self.catalogue.add(self.manifest.apply(series) if self.manifest else series)
                advance(1)
            spread = self.catalogue.spread()
            for parts, joined in run_bounded(client, join_parts, spread, self.config):
                if not isinstance(joined, BaseException):  # else the parts stay as they are
                    self.catalogue.add(taken(parts, joined), again=True)
            if self.manifest:
                self.catalogue.add(self.manifest.unused())
            self.catalogue.commit()

    def _reuse(self, store: Path) -> None:
        thumbnails = PatchStore(store).thumbnails
        with self.stage("reuse", None, "scans") as advance:
            for surveyed, row in self.catalogue.known_from(store):
                file = thumbnail_path(self.catalogue.survey_folder, surveyed.key)
                save_thumbnail(file, thumbnails.read([row])[0])
                self.catalogue.record(surveyed)
                advance(1)
            self.catalogue.commit()

    def _read_pending(self, client: Client) -> None:
        pending = self.catalogue.count("reason IS NULL AND scan_id IS NULL")
        with self.stage("survey", pending, "scans") as advance:
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
        tables = self.catalogue.scan_tables()
        tables["patient"], tables["split"] = split_persons(
            **self.catalogue.claims(), config=self.config
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
        with self.stage("collect", grid.num_shards, "shards") as advance:
            for _, done in run_bounded(
                client, collect_thumbnails, shards, str(self.writer.path), folder
            ):
                raise_if_failed(done)
                advance(1)

"""Read the private catalogue beside a store: which files a scan came from, what was rejected.

These functions work while a job runs. Only `pipeline.archive.catalogue` writes.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.archive.rows import (
    digest_settings,
    first_file,
    select_archive,
    select_rejections,
    select_series,
)
from pipeline.archive.series import Series
from store.format import StoreError
from store.reader import PatchStore
from store.scans import scan_name

DATABASE: Final = "catalogue.sqlite"
LOCK: Final = "lock"
SURVEY: Final = "survey"
"""Folder of the catalogue with thumbnails, until the store is sealed."""
SETTINGS: Final = "settings"
"""Name of the digest of the store's settings, among those of the inputs."""


def catalogue_folder(store: Path) -> Path:
    """STORE.catalogue, beside the store, however the store's path is spelled."""
    store = Path(os.path.realpath(store))
    return store.with_name(store.name + ".catalogue")


def has_catalogue(store: Path) -> bool:
    """Whether there is a catalogue beside the store that can be read."""
    return os.access(catalogue_folder(store) / DATABASE, os.R_OK)


def check_catalogue_folder(store: Path) -> None:
    """Raise StoreError where a new store's catalogue would replace something else."""
    folder = catalogue_folder(store)
    if not folder.exists() or (folder / DATABASE).exists():
        return
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK}:
        raise StoreError(
            f"{folder}: is not of semgen, and the catalogue of {store} has this name; rename it, or"
            " give another STORE"
        )


def read_rejections(store: Path) -> list[tuple[str, str, str]]:
    """(first file, reason, detail) of a store's rejected series.

    Raises StoreError without the store's private catalogue.
    """
    with open_read_only(store) as db:
        return select_rejections(db)


def read_sources(store: Path) -> dict[int, str]:
    """First file of each scan, by scan row; StoreError without the private catalogue."""
    with open_read_only(store) as db:
        rows = db.execute("SELECT scan_row, files FROM series WHERE scan_row IS NOT NULL")
        return {row: first_file(files) for row, files in rows}


def add_paths(facts: dict[str, Any], store: PatchStore) -> None:
    """Add the first file of each scan and rejected series to what `store.inspect` describes.

    facts
        Of `describe_store` or `describe_class`; changed in place.

    Raises StoreError without the store's private catalogue.
    """
    sources = read_sources(store.path) if "survey" in store.stages else {}
    if "members" in facts:
        for member in facts["members"]:
            member["file"] = sources[int(store.split(member["split"]).scan[member["row"]])]
        return
    facts["scan_files"] = [
        {"scan": scan_name(store.scans.id[row]), "file": file}
        for row, file in sorted(sources.items())
    ]
    names = {scan["scan"]: scan["file"] for scan in facts["scan_files"]}
    for pair in facts["near_duplicates"] or ():
        pair["files"] = [names[scan] for scan in pair["scans"]]
    facts["rejected_files"] = [
        {"file": file, "reason": reason, "detail": detail}
        for file, reason, detail in read_rejections(store.path)
    ]


def read_inputs(store: Path) -> dict[str, str]:
    """Digests of the job's input files by name; StoreError without the private catalogue."""
    with open_read_only(store) as db:
        digests = dict(db.execute("SELECT name, digest FROM input").fetchall())
        return {name: digest for name, digest in digests.items() if name != SETTINGS}


def read_archive(store: Path) -> list[Path]:
    """Folders and files that the store was prepared from, in the order of the first command.

    StoreError without the private catalogue.
    """
    with open_read_only(store) as db:
        return select_archive(db)


def read_series(store: Path, scan_rows: Iterable[int]) -> Iterator[Series]:
    """The series that became these rows of `scans`; StoreError without the private catalogue."""
    with open_read_only(store) as db:
        for row in scan_rows:
            yield select_series(db, "scan_row", row)


@contextlib.contextmanager
def open_read_only(store: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a store's catalogue; StoreError unless it belongs to this store."""
    file = catalogue_folder(store) / DATABASE
    if not has_catalogue(store):
        raise StoreError(
            f"{file}: missing, or not readable by you; only this file records which scan came from"
            " which files. Keep it beside the store when you move the store"
        )
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as db:
        try:
            _roll_back(db, file)
            if not _belongs(db, store):
                raise StoreError(
                    f"{file.parent}: the catalogue of another store; move the one that belongs to"
                    f" {store} here"
                )
            yield db
        except sqlite3.Error as error:
            raise StoreError(
                f"{file}: {error}; restore the file from a copy, or delete {store} and prepare"
                " it again"
            ) from error


def _roll_back(db: sqlite3.Connection, file: Path) -> None:
    """Undo what a killed process left half-written, which a read-only connection cannot do."""
    try:
        db.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        with contextlib.closing(sqlite3.connect(file)) as writable:
            writable.execute("SELECT count(*) FROM sqlite_master")


def _belongs(db: sqlite3.Connection, store: Path) -> bool:
    """Whether a catalogue is this store's: the same settings, and the same scans in its rows.

    A store follows from these and its archive, so a catalogue that agrees is as good as its own,
    wherever both were moved or copied to. Nothing private needs to be in the store.
    """
    opened = PatchStore(store, allow_building=True)
    known = db.execute("SELECT digest FROM input WHERE name = ?", (SETTINGS,)).fetchone()
    if known not in (None, (digest_settings(opened.config),)):  # older versions recorded none
        return False
    if "survey" not in opened.stages:
        (count,) = db.execute("SELECT count(*) FROM series WHERE scan_id IS NOT NULL").fetchone()
        return not count or (catalogue_folder(store) / SURVEY).is_dir()
    rows = db.execute("SELECT scan_id FROM series WHERE scan_row IS NOT NULL ORDER BY scan_row")
    return np.array_equal([int(scan_id, 16) for (scan_id,) in rows], opened.scans.id)

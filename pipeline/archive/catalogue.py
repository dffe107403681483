"""The private catalogue beside a store: which files are which scan, and what became of them.

The only place with paths; its folder is readable by its owner alone. SQLite, so that a million
series need no memory and a killed job loses nothing that was committed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.archive.series import DUPLICATE, JOINED, OF_PARTS, Series
from store.format import StoreError
from store.reader import PatchStore

_SCHEMA = """
CREATE TABLE IF NOT EXISTS series (
    key TEXT PRIMARY KEY, kind TEXT, files TEXT, num_files INTEGER, patient TEXT, study TEXT,
    uid TEXT, axial INTEGER, slice_gap_mm REAL, split INTEGER, stamp TEXT, reason TEXT, detail TEXT,
    scan_id TEXT, spacing_mm TEXT, size TEXT, frame_mm TEXT, scan_row INTEGER
);
CREATE INDEX IF NOT EXISTS series_by_row ON series (scan_row);
CREATE INDEX IF NOT EXISTS series_by_study ON series (study);
CREATE INDEX IF NOT EXISTS series_by_uid ON series (uid);
CREATE TABLE IF NOT EXISTS timing (stage TEXT PRIMARY KEY, seconds REAL);
CREATE TABLE IF NOT EXISTS input (name TEXT PRIMARY KEY, digest TEXT);
CREATE TABLE IF NOT EXISTS archive (number INTEGER PRIMARY KEY, path TEXT);
"""
_COMMIT_SECONDS = 0.5
_SETTINGS = "settings"  # among the inputs
_SURVEY = "survey"
_PREFERENCE = "axial DESC, slice_gap_mm, num_files DESC, key"
NOT_LISTED = "not in the manifest"
NOT_CHOSEN = "not chosen"
"""Reason of a usable series that another one of its study is preferred to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surveyed:
    """What reading one series found: geometry, or the reason why it is rejected."""

    key: str
    reason: str | None = None
    detail: str = ""
    scan_id: int = 0
    spacing_mm: tuple[float, ...] = ()
    size: tuple[int, ...] = ()
    frame_mm: tuple[tuple[float, ...], ...] = ()


class Catalogue:
    """The catalogue of one store, held by one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Make or open it; StoreError when another process holds it."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StoreError(
                f"{folder}: another prepare is at work on this store; wait for it to end"
            ) from error
        self._db = sqlite3.connect(folder / "catalogue.sqlite")
        try:
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            self.close()
            raise StoreError(
                f"{folder}: {error}; free disk space or check write permission"
            ) from error
        self._committed = time.monotonic()

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    @property
    def survey_folder(self) -> Path:
        """Where workers leave thumbnails, one file a scan."""
        return self.folder / _SURVEY

    @property
    def autoencoder_checkpoint(self) -> Path:
        """Where an unfinished training of the autoencoder goes on from."""
        return self.folder / "autoencoder.pt"

    def reset(self) -> None:
        """Forget everything."""
        for table in ("series", "timing", "input", "archive"):
            self._db.execute(f"DELETE FROM {table}")
        self.commit()
        self.tidy()

    def tidy(self) -> None:
        """Delete what only an unfinished job needs."""
        shutil.rmtree(self.survey_folder, ignore_errors=True)
        self.autoencoder_checkpoint.unlink(missing_ok=True)

    def add(self, series: Iterable[Series], *, again: bool = False) -> None:
        """Enter series; one that is known stays as it is, or is replaced when entered `again`."""
        self._db.executemany(
            f"INSERT OR {'REPLACE' if again else 'IGNORE'} INTO series (key, kind, files,"
            " num_files, patient, study, uid, axial, slice_gap_mm, split, stamp, reason, detail)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    s.key,
                    s.kind,
                    _paths(s.files),
                    len(s.files),
                    s.patient,
                    s.study,
                    s.uid,
                    s.axial,
                    s.slice_gap_mm,
                    s.split,
                    s.stamp,
                    s.reason,
                    s.detail,
                )
                for s in series
            ),
        )
        self._commit_now_and_then()

    def spread(self) -> list[tuple[Series, ...]]:
        """Those DICOM series that lie in several folders, as their parts.

        Parts that a manifest leaves out are among them, last, where the listed ones are no scan
        by themselves.
        """
        listed = f"(reason IS NULL OR reason IN {OF_PARTS})"
        may_join = f"(reason = '{NOT_LISTED}' OR {listed}) AND scan_id IS NULL AND uid != ''"
        rows = self._db.execute(
            f"SELECT uid, key FROM series WHERE {may_join} AND uid IN (SELECT uid FROM series"
            f" WHERE {may_join} GROUP BY uid HAVING count(*) > 1 AND sum({listed}) > 0)"
            f" ORDER BY uid, reason IS NOT NULL AND reason = '{NOT_LISTED}', files"
        ).fetchall()
        found = []
        for _, group in itertools.groupby(rows, key=lambda row: row[0]):
            parts = [self._series("key = ?", key) for _, key in group]
            if any(part.reason is None for part in parts):
                parts = [part for part in parts if part.reason != NOT_LISTED]
            if len(parts) > 1:
                found.append(tuple(parts))
        return found

    def choose(self) -> None:
        """Set all but one series of each study aside: the thinnest axial one stays."""
        self._db.execute(
            f"UPDATE series SET reason = '{NOT_CHOSEN}', detail = 'its study has a better one'"
            " WHERE reason IS NULL AND key NOT IN (SELECT key FROM (SELECT key, row_number() OVER"
            f" (PARTITION BY study ORDER BY {_PREFERENCE}) AS place FROM series"
            " WHERE reason IS NULL OR scan_id IS NOT NULL) WHERE place = 1)"
        )
        self.commit()

    def choose_again(self) -> int:
        """Where a study's series proved unusable, take its next best; returns how many."""
        count = self._db.execute(
            "UPDATE series SET reason = NULL, detail = '' WHERE key IN (SELECT key FROM (SELECT"
            f" key, row_number() OVER (PARTITION BY study ORDER BY {_PREFERENCE}) AS place FROM"
            f" series WHERE reason = '{NOT_CHOSEN}' AND study NOT IN (SELECT study FROM series"
            f" WHERE reason IS NULL OR scan_id IS NOT NULL AND reason != '{NOT_CHOSEN}'))"
            " WHERE place = 1)"
        ).rowcount
        self.commit()
        return count

    def listing(self) -> Iterator[tuple[str, int, str | None, str]]:
        """(first file, number of files, reason, detail) of every series, in order of its file."""
        rows = self._db.execute(
            "SELECT files, num_files, reason, detail FROM series ORDER BY files, key"
        )
        return (
            (_first_path(files), count, reason, detail) for files, count, reason, detail in rows
        )

    def known_from(self, store: Path) -> Iterator[tuple[Surveyed, int]]:
        """What another store's survey found of series that are pending here and unchanged since.

        With each comes the row of its scan there. Series that were rejected there are not
        among them: the reason may have gone.
        """
        with _read_only(store) as other:
            pending = self._db.execute(
                "SELECT key, stamp FROM series WHERE reason IS NULL AND scan_id IS NULL"
                " AND stamp != '' ORDER BY key"
            ).fetchall()
            for key, stamp in pending:
                found = other.execute(
                    "SELECT scan_id, spacing_mm, size, frame_mm, scan_row FROM series"
                    " WHERE key = ? AND stamp = ? AND scan_row IS NOT NULL",
                    (key, stamp),
                ).fetchone()
                if found is None:
                    continue
                scan_id, spacing, size, frame, row = found
                surveyed = Surveyed(
                    key=key,
                    scan_id=int(scan_id, 16),
                    spacing_mm=tuple(json.loads(spacing)),
                    size=tuple(json.loads(size)),
                    frame_mm=tuple(tuple(corner) for corner in json.loads(frame)),
                )
                yield surveyed, row

    def record(self, surveyed: Surveyed) -> None:
        """Note what the survey of one series found."""
        self._db.execute(
            "UPDATE series SET reason = ?, detail = ?, scan_id = ?, spacing_mm = ?, size = ?,"
            " frame_mm = ? WHERE key = ?",
            (
                surveyed.reason,
                surveyed.detail,
                None if surveyed.reason else f"{surveyed.scan_id:016x}",
                json.dumps(surveyed.spacing_mm),
                json.dumps(surveyed.size),
                json.dumps(surveyed.frame_mm),
                surveyed.key,
            ),
        )
        self._commit_now_and_then()

    def _commit_now_and_then(self) -> None:
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        self._db.commit()
        self._committed = time.monotonic()

    def count(self, where: str = "1") -> int:
        """Series for which an SQL condition holds."""
        return int(self._db.execute(f"SELECT count(*) FROM series WHERE {where}").fetchone()[0])

    def pending(self) -> Iterator[Series]:
        """Series still to be surveyed, in a stable order."""
        keys = [
            row[0]
            for row in self._db.execute(
                "SELECT key FROM series WHERE reason IS NULL AND scan_id IS NULL ORDER BY key"
            )
        ]
        return (self._series("key = ?", key) for key in keys)

    def scan_series(self, scan_row: int) -> Series:
        """The series that became a row of `scans`."""
        return self._series("scan_row = ?", scan_row)

    def _series(self, where: str, value: str | int) -> Series:
        return _series(self._db, where, value)

    def reject_duplicates(self) -> None:
        """Of several series with the same content, keep the first by key."""
        self._db.execute(
            f"UPDATE series SET reason = '{DUPLICATE}', detail = 'content of ' || scan_id"
            " WHERE scan_id IS NOT NULL AND reason IS NULL AND key NOT IN"
            " (SELECT min(key) FROM series WHERE scan_id IS NOT NULL GROUP BY scan_id)"
        )
        self.commit()

    def number_scans(self) -> int:
        """Give accepted scans their rows, in order of their pseudonyms; returns how many."""
        self._db.execute("UPDATE series SET scan_row = NULL")
        self._db.execute(
            "UPDATE series SET scan_row = numbered.n FROM (SELECT key AS k, row_number() OVER"
            " (ORDER BY scan_id) - 1 AS n FROM series WHERE reason IS NULL) AS numbered"
            " WHERE series.key = numbered.k"
        )
        self.commit()
        return self.count("scan_row IS NOT NULL")

    def scan_tables(self) -> dict[str, NDArray[Any]]:
        """Tables of the accepted scans in row order: `id`, `spacing_mm`, `size`, `frame_mm`."""
        rows = self._db.execute(
            "SELECT scan_id, spacing_mm, size, frame_mm FROM series"
            " WHERE scan_row IS NOT NULL ORDER BY scan_row"
        ).fetchall()
        ids, spacing, size, frame = zip(*rows, strict=True)
        return {
            "id": np.array([int(i, 16) for i in ids], np.uint64),
            "spacing_mm": np.array([json.loads(s) for s in spacing], np.float64),
            "size": np.array([json.loads(s) for s in size], np.int32),
            "frame_mm": np.array([json.loads(f) for f in frame], np.float64),
        }

    def claims(self) -> dict[str, NDArray[Any]]:
        """Whose the accepted scans are, by every series that holds one: also by rejected copies.

        `scan`, a row; `person`, an opaque word; `wanted_split`: 0, 1, or -1 where no manifest says.
        A scan has as many lines as different series say different things of it.
        """
        of_copies = (
            "SELECT kept.scan_row, copy.patient, copy.split FROM series AS copy"
            " JOIN series AS kept ON kept.scan_id = copy.scan_id WHERE kept.scan_row IS NOT NULL"
        )
        of_parts = (  # folders of one series: all but the first have no scan of their own
            "SELECT kept.scan_row, part.patient, part.split FROM series AS part"
            " JOIN series AS whole ON whole.uid = part.uid"
            " JOIN series AS kept ON kept.scan_id = whole.scan_id WHERE kept.scan_row IS NOT NULL"
            f" AND part.uid != '' AND part.reason IN ('{JOINED}', '{DUPLICATE}')"
        )
        rows = self._db.execute(f"{of_copies} UNION {of_parts} ORDER BY 1, 2, 3").fetchall()
        scan, person, split = zip(*rows, strict=True)
        return {
            "scan": np.array(scan, np.int64),
            "person": np.array(person),
            "wanted_split": np.array([-1 if s is None else s for s in split], np.int8),
        }

    def scan_keys(self) -> list[str]:
        """Series keys by scan row."""
        return [
            row[0]
            for row in self._db.execute(
                "SELECT key FROM series WHERE scan_row IS NOT NULL ORDER BY scan_row"
            )
        ]

    def reasons(self) -> dict[str, int]:
        """How many series each reason rejected."""
        return dict(sorted(Counter(reason for _, reason, _ in _rejections(self._db)).items()))

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time that a stage took, over all runs."""
        self._db.execute(
            "INSERT INTO timing VALUES (?, ?) ON CONFLICT (stage)"
            " DO UPDATE SET seconds = seconds + excluded.seconds",
            (stage, seconds),
        )
        self.commit()

    def note_inputs(self, digests: dict[str, str], settings: dict[str, Any]) -> None:
        """Keep what shaped this store beside its archive: digests by name, and its settings."""
        noted = {**digests, _SETTINGS: _digest(settings)}
        self._db.executemany("INSERT OR REPLACE INTO input VALUES (?, ?)", noted.items())
        self.commit()

    def note_archive(self, archive: Sequence[Path]) -> None:
        """Keep the folders and files that were named, in their order; resolved paths."""
        self._db.execute("DELETE FROM archive")
        self._db.executemany("INSERT INTO archive VALUES (?, ?)", enumerate(map(_hex, archive)))
        self.commit()

    def move_archive(self, archive: Sequence[Path]) -> None:
        """The folders and files that `note_archive` kept lie here now, in the same order."""
        pairs = zip(_archive(self._db), archive, strict=True)
        moves = [(str(before).rstrip("/"), str(after).rstrip("/")) for before, after in pairs]
        moves.sort(key=lambda move: len(move[0]), reverse=True)  # the folder closest above counts

        def move(file: str) -> str:
            for before, after in moves:
                if file == before or file.startswith(f"{before}/"):
                    return after + file[len(before) :]
            return file

        self._db.create_function("moved", 1, lambda files: _paths(map(move, _files(files))))
        self._db.execute("UPDATE series SET files = moved(files)")
        self.note_archive(archive)

    def seconds(self) -> dict[str, float]:
        return dict(self._db.execute("SELECT stage, seconds FROM timing").fetchall())


def catalogue_folder(store: Path) -> Path:
    """STORE.catalogue, beside the store, however the store's path is spelled."""
    store = Path(os.path.realpath(store))
    return store.with_name(store.name + ".catalogue")


def has_catalogue(store: Path) -> bool:
    """Whether a catalogue lies beside the store and can be read."""
    return os.access(_database(store), os.R_OK)


def thumbnail_path(survey_folder: Path, key: str) -> Path:
    """Where the thumbnail of a series lies until the store is sealed."""
    return survey_folder / key[:2] / f"{key}.chunk"


def _paths(files: Iterable[str]) -> str:
    """File names as JSON, hex-coded: names may be bytes that no text encoding has."""
    return json.dumps([_hex(f) for f in files])


def _hex(path: str | Path) -> str:
    return os.fsencode(path).hex()


def _files(packed: str) -> list[str]:
    """What `_paths` packed."""
    return [os.fsdecode(bytes.fromhex(f)) for f in json.loads(packed)]


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_rejections(store: Path) -> list[tuple[str, str, str]]:
    """(first file, reason, detail) of a store's rejected series.

    Raises StoreError without the store's private catalogue.
    """
    with _read_only(store) as db:
        return _rejections(db)


def read_sources(store: Path) -> dict[int, str]:
    """First file of each scan, by scan row; StoreError without the private catalogue."""
    with _read_only(store) as db:
        rows = db.execute("SELECT scan_row, files FROM series WHERE scan_row IS NOT NULL")
        return {row: _first_path(files) for row, files in rows}


def read_inputs(store: Path) -> dict[str, str]:
    """The digests that `note_inputs` kept; StoreError without the private catalogue."""
    with _read_only(store) as db:
        noted = dict(db.execute("SELECT name, digest FROM input").fetchall())
        return {name: digest for name, digest in noted.items() if name != _SETTINGS}


def read_archive(store: Path) -> list[Path]:
    """What `note_archive` kept, nothing before it; StoreError without the private catalogue."""
    with _read_only(store) as db:
        return _archive(db)


def read_series(store: Path, scan_rows: Iterable[int]) -> Iterator[Series]:
    """The series that became these rows of `scans`; StoreError without the private catalogue."""
    with _read_only(store) as db:
        for row in scan_rows:
            yield _series(db, "scan_row = ?", row)


@contextlib.contextmanager
def _read_only(store: Path) -> Iterator[sqlite3.Connection]:
    """A connection that works beside a running job; StoreError unless it is this store's own."""
    file = _database(store)
    if not has_catalogue(store):
        raise StoreError(
            f"{file}: missing, or you may not read it; only this file knows which scan came from"
            " which files. Keep it beside the store when you move the store"
        )
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as db:
        try:
            if not _belongs(db, store):
                raise StoreError(
                    f"{file.parent}: the catalogue of another store; move the one that belongs to"
                    f" {store} here"
                )
            yield db
        except sqlite3.Error as error:
            raise StoreError(
                f"{file}: {error}; bring the file back from a copy, or delete {store} and prepare"
                " it again"
            ) from error


def _belongs(db: sqlite3.Connection, store: Path) -> bool:
    """Whether a catalogue is this store's: the same settings, and the same scans in its rows.

    A store follows from these and its archive, so a catalogue that agrees is as good as its own,
    wherever both were moved or copied to. Nothing private needs to stand in the store.
    """
    opened = PatchStore(store, allow_building=True)
    noted = db.execute("SELECT digest FROM input WHERE name = ?", (_SETTINGS,)).fetchone()
    if noted not in (None, (_digest(opened.config),)):  # older versions noted none
        return False
    if "survey" not in opened.stages:
        (known,) = db.execute("SELECT count(*) FROM series WHERE scan_id IS NOT NULL").fetchone()
        return not known or (catalogue_folder(store) / _SURVEY).is_dir()
    rows = db.execute("SELECT scan_id FROM series WHERE scan_row IS NOT NULL ORDER BY scan_row")
    return np.array_equal([int(scan_id, 16) for (scan_id,) in rows], opened.scans.id)


def _database(store: Path) -> Path:
    return catalogue_folder(store) / "catalogue.sqlite"


def _archive(db: sqlite3.Connection) -> list[Path]:
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'archive'").fetchone():
        return []  # older versions kept none
    rows = db.execute("SELECT path FROM archive ORDER BY number").fetchall()
    return [Path(os.fsdecode(bytes.fromhex(path))) for (path,) in rows]


def _series(db: sqlite3.Connection, where: str, value: str | int) -> Series:
    row = db.execute(
        "SELECT key, kind, files, patient, study, uid, axial, slice_gap_mm, split, stamp, reason,"
        f" detail FROM series WHERE {where}",
        (value,),
    ).fetchone()
    key, kind, files, patient, study, uid, axial, gap_mm, split, stamp, reason, detail = row
    return Series(
        key=key,
        kind=kind,
        files=tuple(_files(files)),
        patient=patient,
        study=study,
        uid=uid,
        axial=bool(axial),
        slice_gap_mm=gap_mm,
        split=split,
        stamp=stamp,
        reason=reason,
        detail=detail,
    )


def _rejections(db: sqlite3.Connection) -> list[tuple[str, str, str]]:
    rows = db.execute(
        f"SELECT files, reason, detail FROM series WHERE reason != '{JOINED}' ORDER BY reason, key"
    )
    return [(_first_path(files), reason, detail) for files, reason, detail in rows]


def _first_path(files: str) -> str:
    return _files(files)[0]

"""Write the private catalogue beside a store: series, their files, and what was found in them.

The only place with paths; its folder is readable by its owner alone. SQLite, so that a million
series need no memory and a killed job loses nothing that was committed.
"""

from __future__ import annotations

import fcntl
import json
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

from pipeline.archive.lookup import DATABASE, LOCK, SETTINGS, SURVEY, open_read_only
from pipeline.archive.rows import (
    PLAIN_COLUMNS,
    digest_settings,
    first_file,
    pack_files,
    pack_path,
    select_archive,
    select_rejections,
    select_series,
    unpack_files,
)
from pipeline.archive.series import NOT_READABLE, Series
from store.format import StoreError
from store.scans import scan_name

_SCHEMA = """
CREATE TABLE IF NOT EXISTS series (
    key TEXT PRIMARY KEY, kind TEXT, files TEXT, num_files INTEGER, patient TEXT, study TEXT,
    uid TEXT, axial INTEGER, slice_gap_mm REAL, split INTEGER, stamp TEXT, reason TEXT, detail TEXT,
    scan_id TEXT, spacing_mm TEXT, size TEXT, frame_mm TEXT, scan_row INTEGER, statistics_hu TEXT
);
CREATE INDEX IF NOT EXISTS series_by_row ON series (scan_row);
CREATE INDEX IF NOT EXISTS series_by_study ON series (study);
CREATE INDEX IF NOT EXISTS series_by_uid ON series (uid);
CREATE TABLE IF NOT EXISTS timing (stage TEXT PRIMARY KEY, seconds REAL);
CREATE TABLE IF NOT EXISTS input (name TEXT PRIMARY KEY, digest TEXT);
CREATE TABLE IF NOT EXISTS archive (number INTEGER PRIMARY KEY, path TEXT);
"""
_COMMIT_SECONDS = 0.5
_PENDING = "reason IS NULL AND scan_id IS NULL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Surveyed:
    """Result of reading one series: its geometry, or the reason why it is rejected."""

    key: str
    reason: str | None = None
    detail: str = ""
    scan_id: int = 0
    spacing_mm: tuple[float, ...] = ()
    size: tuple[int, ...] = ()
    frame_mm: tuple[tuple[float, ...], ...] = ()
    statistics_hu: tuple[float, ...] = ()
    """Mean and standard deviation of all voxels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedSeries:
    """One series as a dry run shows it."""

    file: str
    """The first file."""
    files: int
    reason: str | None
    """Why it is rejected; None if it would be read."""
    detail: str
    size: list[int]
    """Voxels (z, y, x) after the scan is turned to LPS; empty where not known."""
    spacing_mm: list[float]
    """(z, y, x); empty where not known."""


class Catalogue:
    """The catalogue of one store, open for writing in one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Create or open it; StoreError when another process has it open."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._lock = (folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StoreError(
                f"{folder}: another prepare is running on this store; wait until it ends"
            ) from error
        self.db = sqlite3.connect(folder / DATABASE)
        try:
            self.db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            self.close()
            raise StoreError(
                f"{folder}: {error}; free disk space or check write permission"
            ) from error
        self._committed = time.monotonic()

    def forget_unreadable(self) -> None:
        """Delete series that could not be read: they are listed again, and may be readable now."""
        marks = ", ".join("?" * len(NOT_READABLE))
        self.db.execute(f"DELETE FROM series WHERE reason IN ({marks})", NOT_READABLE)

    def close(self) -> None:
        self.db.close()
        self._lock.close()

    @property
    def survey_folder(self) -> Path:
        """Where workers leave thumbnails, one file a scan."""
        return self.folder / SURVEY

    @property
    def autoencoder_checkpoint(self) -> Path:
        """Checkpoint from which an interrupted training of the autoencoder resumes."""
        return self.folder / "autoencoder.pt"

    @property
    def placing_folder(self) -> Path:
        """Matches that an interrupted discovery resumes from."""
        return self.folder / "placing"

    def reset(self) -> None:
        """Delete all content."""
        for table in ("series", "timing", "input", "archive"):
            self.db.execute(f"DELETE FROM {table}")
        self.commit()
        self.tidy()

    def tidy(self) -> None:
        """Delete what only an unfinished job needs."""
        for folder in (self.survey_folder, self.placing_folder):
            shutil.rmtree(folder, ignore_errors=True)
        self.autoencoder_checkpoint.unlink(missing_ok=True)

    def add(self, series: Iterable[Series], *, again: bool = False) -> None:
        """Insert series; a known one is kept as it is, or replaced where `again` is true."""
        columns = ("files", "num_files", *PLAIN_COLUMNS)
        self.db.executemany(
            f"INSERT OR {'REPLACE' if again else 'IGNORE'} INTO series ({', '.join(columns)})"
            f" VALUES ({', '.join('?' * len(columns))})",
            (
                (pack_files(s.files), len(s.files), *(getattr(s, name) for name in PLAIN_COLUMNS))
                for s in series
            ),
        )
        self._commit_now_and_then()

    def listing(self) -> Iterator[ListedSeries]:
        """Every series, sorted by file."""
        rows = self.db.execute(
            "SELECT files, num_files, reason, detail, size, spacing_mm FROM series"
            " ORDER BY files, key"
        )
        for files, num_files, reason, detail, size, spacing_mm in rows:
            yield ListedSeries(
                file=first_file(files),
                files=num_files,
                reason=reason,
                detail=detail,
                size=json.loads(size or "[]"),
                spacing_mm=json.loads(spacing_mm or "[]"),
            )

    def known_from(self, store: Path) -> Iterator[tuple[Surveyed, int]]:
        """Results of another store's survey for series that are pending here and did not change.

        Yields each result and the row of its scan in the other store. Series that were rejected
        there are left out, since the reason may no longer hold.
        """
        with open_read_only(store) as other:
            pending = self.db.execute(
                f"SELECT key, stamp FROM series WHERE {_PENDING} AND stamp != '' ORDER BY key"
            ).fetchall()
            for key, stamp in pending:
                result = other.execute(
                    "SELECT scan_id, spacing_mm, size, frame_mm, statistics_hu, scan_row"
                    " FROM series WHERE key = ? AND stamp = ? AND scan_row IS NOT NULL",
                    (key, stamp),
                ).fetchone()
                if result is None:
                    continue
                scan_id, spacing, size, frame, statistics, row = result
                surveyed = Surveyed(
                    key=key,
                    scan_id=int(scan_id, 16),
                    spacing_mm=tuple(json.loads(spacing)),
                    size=tuple(json.loads(size)),
                    frame_mm=tuple(tuple(corner) for corner in json.loads(frame)),
                    statistics_hu=tuple(json.loads(statistics)),
                )
                yield surveyed, row

    def record(self, surveyed: Surveyed) -> None:
        """Store the result of surveying one series."""
        self.db.execute(
            "UPDATE series SET reason = ?, detail = ?, scan_id = ?, spacing_mm = ?, size = ?,"
            " frame_mm = ?, statistics_hu = ? WHERE key = ?",
            (
                surveyed.reason,
                surveyed.detail,
                None if surveyed.reason else scan_name(surveyed.scan_id),
                json.dumps(surveyed.spacing_mm),
                json.dumps(surveyed.size),
                json.dumps(surveyed.frame_mm),
                json.dumps(surveyed.statistics_hu),
                surveyed.key,
            ),
        )
        self._commit_now_and_then()

    def _commit_now_and_then(self) -> None:
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        self.db.commit()
        self._committed = time.monotonic()

    def count_pending(self) -> int:
        """Number of series still to be surveyed."""
        return self.count(_PENDING)

    def count_surveyed(self) -> int:
        """Number of series that were read, whatever came of it."""
        return self.count(f"spacing_mm IS NOT NULL AND NOT ({_PENDING})")

    def count(self, condition: str) -> int:
        return int(self.db.execute(f"SELECT count(*) FROM series WHERE {condition}").fetchone()[0])

    def pending(self) -> Iterator[Series]:
        """Series still to be surveyed, in a stable order."""
        keys = self.db.execute(f"SELECT key FROM series WHERE {_PENDING} ORDER BY key").fetchall()
        return (select_series(self.db, "key", key) for (key,) in keys)

    def usable(self, limit: int) -> Iterator[Series]:
        """At most `limit` series that have no reason against them; by key, so in random order."""
        keys = self.db.execute(
            "SELECT key FROM series WHERE reason IS NULL ORDER BY key LIMIT ?", (limit,)
        ).fetchall()
        return (select_series(self.db, "key", key) for (key,) in keys)

    def count_patients(self) -> int:
        """Patients with a series that has no reason against it."""
        query = "SELECT count(DISTINCT patient) FROM series WHERE reason IS NULL"
        return int(self.db.execute(query).fetchone()[0])

    def scan_series(self, scan_row: int) -> Series:
        """The series that became a row of `scans`."""
        return select_series(self.db, "scan_row", scan_row)

    def scan_tables(self) -> dict[str, NDArray[Any]]:
        """Tables of the accepted scans in row order: what `Surveyed` says of them."""
        rows = self.db.execute(
            "SELECT scan_id, spacing_mm, size, frame_mm, statistics_hu FROM series"
            " WHERE scan_row IS NOT NULL ORDER BY scan_row"
        ).fetchall()
        ids, spacing, size, frame, statistics = zip(*rows, strict=True)
        mean_hu, std_hu = np.array([json.loads(s) for s in statistics], np.float64).T
        return {
            "id": np.array([int(i, 16) for i in ids], np.uint64),
            "spacing_mm": np.array([json.loads(s) for s in spacing], np.float64),
            "size": np.array([json.loads(s) for s in size], np.int32),
            "frame_mm": np.array([json.loads(f) for f in frame], np.float64),
            "mean_hu": mean_hu,
            "std_hu": std_hu,
        }

    def scan_keys(self) -> list[str]:
        """Series keys by scan row."""
        return [
            row[0]
            for row in self.db.execute(
                "SELECT key FROM series WHERE scan_row IS NOT NULL ORDER BY scan_row"
            )
        ]

    def reasons(self) -> dict[str, int]:
        """Number of rejected series by reason."""
        return dict(sorted(Counter(reason for _, reason, _ in select_rejections(self.db)).items()))

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time that a stage took, over all runs."""
        self.db.execute(
            "INSERT INTO timing VALUES (?, ?) ON CONFLICT (stage)"
            " DO UPDATE SET seconds = seconds + excluded.seconds",
            (stage, seconds),
        )
        self.commit()

    def record_inputs(self, digests: dict[str, str], settings: dict[str, Any]) -> None:
        """Store digests of the job's input files, by name, and of its settings."""
        inputs = {**digests, SETTINGS: digest_settings(settings)}
        self.db.executemany("INSERT OR REPLACE INTO input VALUES (?, ?)", inputs.items())
        self.commit()

    def record_archive(self, archive: Sequence[Path]) -> None:
        """Store the archive's folders and files (resolved paths), in their order."""
        self.db.execute("DELETE FROM archive")
        self.db.executemany("INSERT INTO archive VALUES (?, ?)", enumerate(map(pack_path, archive)))
        self.commit()

    def move_archive(self, archive: Sequence[Path]) -> None:
        """Change all paths: the recorded folders and files are now these, in the same order."""
        pairs = zip(select_archive(self.db), archive, strict=True)
        moves = [(str(before).rstrip("/"), str(after).rstrip("/")) for before, after in pairs]
        moves.sort(key=lambda move: len(move[0]), reverse=True)  # the closest parent folder first

        def move(file: str) -> str:
            for before, after in moves:
                if file == before or file.startswith(f"{before}/"):
                    return after + file[len(before) :]
            return file

        self.db.create_function(
            "moved", 1, lambda files: pack_files(map(move, unpack_files(files)))
        )
        self.db.execute("UPDATE series SET files = moved(files)")
        self.record_archive(archive)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, over all runs."""
        return dict(self.db.execute("SELECT stage, seconds FROM timing").fetchall())


def thumbnail_path(survey_folder: Path, key: str) -> Path:
    """File of a series' thumbnail until the store is sealed."""
    return survey_folder / key[:2] / f"{key}.chunk"

"""Rows of the catalogue as values: series, rejections, and paths, which are stored in hex."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from pipeline.archive.series import JOINED, Series

PLAIN_COLUMNS: Final = tuple(f.name for f in dataclasses.fields(Series) if f.name != "files")
"""Columns of the table `series` that hold fields of a `Series` as they are."""


def select_series(db: sqlite3.Connection, column: str, value: str | int) -> Series:
    """The one series with this value in a column."""
    files, *row = db.execute(
        f"SELECT files, {', '.join(PLAIN_COLUMNS)} FROM series WHERE {column} = ?", (value,)
    ).fetchone()
    known = dict(zip(PLAIN_COLUMNS, row, strict=True))
    known["axial"] = bool(known["axial"])  # SQLite has no type for it
    return Series(files=tuple(unpack_files(files)), **known)


def select_rejections(db: sqlite3.Connection) -> list[tuple[str, str, str]]:
    """(first file, reason, detail) of rejected series; not of those that joined another."""
    rows = db.execute(
        f"SELECT files, reason, detail FROM series WHERE reason != '{JOINED}' ORDER BY reason, key"
    )
    return [(first_file(files), reason, detail) for files, reason, detail in rows]


def select_archive(db: sqlite3.Connection) -> list[Path]:
    """Folders and files of the archive."""
    rows = db.execute("SELECT path FROM archive ORDER BY number").fetchall()
    return [Path(os.fsdecode(bytes.fromhex(path))) for (path,) in rows]


def pack_files(files: Iterable[str]) -> str:
    """File names as JSON, each in hex: a name may be bytes that are not valid text."""
    return json.dumps([pack_path(file) for file in files])


def pack_path(path: str | Path) -> str:
    """A path's bytes in hex."""
    return os.fsencode(path).hex()


def unpack_files(packed: str) -> list[str]:
    """The file names that `pack_files` packed."""
    return [os.fsdecode(bytes.fromhex(file)) for file in json.loads(packed)]


def first_file(packed: str) -> str:
    """The first of the file names that `pack_files` packed."""
    return unpack_files(packed)[0]


def digest_settings(settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

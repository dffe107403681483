"""Rows of the catalogue as values: series, rejections, and paths, which are stored in hex."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.archive.series import JOINED, Series


def select_series(db: sqlite3.Connection, column: str, value: str | int) -> Series:
    """The one series with this value in a column."""
    row = db.execute(
        "SELECT key, kind, files, patient, study, uid, axial, slice_gap_mm, split, stamp, reason,"
        f" detail FROM series WHERE {column} = ?",
        (value,),
    ).fetchone()
    key, kind, files, patient, study, uid, axial, gap_mm, split, stamp, reason, detail = row
    return Series(
        key=key,
        kind=kind,
        files=tuple(unpack_files(files)),
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


def select_rejections(db: sqlite3.Connection) -> list[tuple[str, str, str]]:
    """(first file, reason, detail) of rejected series; not of those that joined another."""
    rows = db.execute(
        f"SELECT files, reason, detail FROM series WHERE reason != '{JOINED}' ORDER BY reason, key"
    )
    return [(first_file(files), reason, detail) for files, reason, detail in rows]


def select_archive(db: sqlite3.Connection) -> list[Path]:
    """Folders and files of the archive; empty where an older version did not record them."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'archive'").fetchone():
        return []
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

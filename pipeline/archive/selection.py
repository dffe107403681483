"""Which series become scans: the rules of selection, as SQL on the catalogue.

A series is accepted while it has no reason; each rule gives a reason to those that it rejects.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.rows import select_series
from pipeline.archive.series import (
    DUPLICATE,
    JOINED,
    MAY_BE_INCOMPLETE,
    NOT_CHOSEN,
    NOT_LISTED,
    Series,
)

_PREFERENCE = "axial DESC, slice_gap_mm, num_files DESC, uid, key"
"""Before `key`, which is made of names of folders, the hash of the series' UID decides."""


def series_in_parts(catalogue: Catalogue) -> list[tuple[Series, ...]]:
    """DICOM series that lie in several folders, each as its parts.

    Parts that a manifest does not list are included, last, where the listed parts alone do not
    make a scan.
    """
    listed = f"(reason IS NULL OR reason IN {MAY_BE_INCOMPLETE})"
    may_join = f"(reason = '{NOT_LISTED}' OR {listed}) AND scan_id IS NULL AND uid != ''"
    rows = catalogue.db.execute(
        f"SELECT uid, key FROM series WHERE {may_join} AND uid IN (SELECT uid FROM series"
        f" WHERE {may_join} GROUP BY uid HAVING count(*) > 1 AND sum({listed}) > 0)"
        f" ORDER BY uid, reason IS NOT NULL AND reason = '{NOT_LISTED}', files"
    ).fetchall()
    several = []
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        parts = [select_series(catalogue.db, "key", key) for _, key in group]
        if any(part.reason is None for part in parts):
            parts = [part for part in parts if part.reason != NOT_LISTED]
        if len(parts) > 1:
            several.append(tuple(parts))
    return several


def choose_one_per_study(catalogue: Catalogue) -> None:
    """Reject all but the best series of each study: axial, thinnest slices, most slices."""
    catalogue.db.execute(
        f"UPDATE series SET reason = '{NOT_CHOSEN}', scan_id = NULL,"
        " detail = 'its study has a series that is axial, thinner, of more slices, or as good'"
        " WHERE reason IS NULL AND key NOT IN (SELECT key FROM (SELECT key, row_number() OVER"
        f" (PARTITION BY study ORDER BY {_PREFERENCE}) AS rank FROM series"
        " WHERE reason IS NULL OR scan_id IS NOT NULL) WHERE rank = 1)"
    )
    catalogue.commit()


def choose_next_best(catalogue: Catalogue) -> int:
    """Accept the next best series of studies whose best was unusable; returns how many."""
    count = catalogue.db.execute(
        "UPDATE series SET reason = NULL, detail = '' WHERE key IN (SELECT key FROM (SELECT"
        f" key, row_number() OVER (PARTITION BY study ORDER BY {_PREFERENCE}) AS rank FROM"
        f" series WHERE reason = '{NOT_CHOSEN}' AND study NOT IN (SELECT study FROM series"
        f" WHERE reason IS NULL OR scan_id IS NOT NULL AND reason != '{NOT_CHOSEN}'))"
        " WHERE rank = 1)"
    ).rowcount
    catalogue.commit()
    return count


def reject_duplicates(catalogue: Catalogue) -> None:
    """Of several series with the same voxels, keep one, whatever their folders are called.

    Their spacing may differ by rounding: NIfTI has fewer digits than DICOM, which comes first.
    """
    catalogue.db.execute(
        f"UPDATE series SET reason = '{DUPLICATE}', detail = 'same voxels as scan ' || scan_id"
        " WHERE scan_id IS NOT NULL AND reason IS NULL AND key NOT IN (SELECT key FROM"
        " (SELECT key, row_number() OVER (PARTITION BY scan_id ORDER BY kind, spacing_mm, uid, key)"
        " AS rank FROM series WHERE scan_id IS NOT NULL) WHERE rank = 1)"
    )
    catalogue.commit()


def number_scans(catalogue: Catalogue) -> int:
    """Give accepted scans their rows, in order of their scan ids; returns how many."""
    catalogue.db.execute("UPDATE series SET scan_row = NULL")
    catalogue.db.execute(
        "UPDATE series SET scan_row = numbered.n FROM (SELECT key AS k, row_number() OVER"
        " (ORDER BY scan_id) - 1 AS n FROM series WHERE reason IS NULL) AS numbered"
        " WHERE series.key = numbered.k"
    )
    catalogue.commit()
    return catalogue.count("scan_row IS NOT NULL")


def patients_of_scans(catalogue: Catalogue) -> dict[str, NDArray[Any]]:
    """Patient and wanted split of every series whose voxels are those of an accepted scan.

    Rejected copies count too, so a scan may have several entries. Returns columns of equal
    length: `scan`, a row; `patient`, the series' patient key; `wanted_split`, 0 or 1 where the
    manifest names a split, else -1.
    """
    of_copies = (
        "SELECT kept.scan_row, copy.patient, copy.split FROM series AS copy"
        " JOIN series AS kept ON kept.scan_id = copy.scan_id WHERE kept.scan_row IS NOT NULL"
    )
    # Folders of one series: all but the first have no scan of their own. CROSS JOIN keeps SQLite
    # from starting at `first`, where all files without a uid would be compared with each other.
    of_parts = (
        "SELECT kept.scan_row, part.patient, part.split FROM series AS part"
        " CROSS JOIN series AS first ON first.uid = part.uid"
        " CROSS JOIN series AS kept ON kept.scan_id = first.scan_id"
        " WHERE kept.scan_row IS NOT NULL"
        f" AND part.uid != '' AND part.reason IN ('{JOINED}', '{DUPLICATE}')"
    )
    rows = catalogue.db.execute(f"{of_copies} UNION {of_parts} ORDER BY 1, 2, 3").fetchall()
    scan, patient, split = zip(*rows, strict=True)
    return {
        "scan": np.array(scan, np.int64),
        "patient": np.array(patient),
        "wanted_split": np.array([-1 if s is None else s for s in split], np.int8),
    }

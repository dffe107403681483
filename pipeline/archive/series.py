"""A series as the catalogue stores it, and the reasons for which one is not used.

Imports no library that reads images.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Final

from store.images import UNREADABLE

CRASHED: Final = "reader crashed"
"""Reason of a series whose reading killed its process, or had to be stopped."""
OUT_OF_MEMORY: Final = "out of memory"
"""Reason of a series that could not be allocated, or whose reader was killed again and again."""
INTERNAL: Final = "internal error"
"""Reason of a series on which semgen itself failed; the detail is the traceback."""
NOT_READABLE: Final = (UNREADABLE, "folder not readable", "file not readable", "broken link")
"""Reasons that may vanish when a disk or a permission is back."""
MAY_BE_INCOMPLETE: Final = ("too few slices", "missing slices", "uneven slice spacing")
"""Reasons that may vanish when the slices of other folders join a series."""
JOINED: Final = "joined"
"""Reason of a series whose slices belong to the same series in another folder."""
DUPLICATE: Final = "duplicate"
NOT_LISTED: Final = "not in the manifest"
NOT_CHOSEN: Final = "not chosen"
"""Reason of a usable series when another series of its study is used."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One series: its files, and what its headers say."""

    key: str
    """Hash that identifies it within an archive."""
    kind: str
    """"dicom" or "file"."""
    files: tuple[str, ...]
    """In slice order."""
    patient: str
    """Hash shared by the scans of one patient."""
    study: str = ""
    """Hash shared by the series of one study."""
    uid: str = ""
    """Hash shared by the parts of one DICOM series that lies in several folders."""
    axial: bool = True
    slice_gap_mm: float | None = None
    split: int | None = None
    """0 train, 1 validation, where a manifest says so."""
    stamp: str = ""
    """Hash of the files' sizes and times; empty where not all files of the series are known."""
    reason: str | None = None
    """Why the headers alone reject it, or None."""
    detail: str = ""

    def __repr__(self) -> str:
        return f"<Series {self.key}: {self.kind}, {len(self.files)} files>"


def hash_words(*words: str) -> str:
    """A 64-bit hash (hex) of texts, which stands for them in keys."""
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def patient_key(patient_id: str) -> str:
    """The hash that stands for a PatientID."""
    return hash_words("patient", patient_id)

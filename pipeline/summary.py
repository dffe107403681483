"""What a job returns: counts, size and times of the store that it prepared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from store.format import SPLITS
from store.reader import PatchStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Result of a job."""

    already_complete: bool
    """The store was complete before; nothing was done."""
    accepted: int
    """Scans."""
    rejected: dict[str, int]
    """Series by reason."""
    classes: int
    classes_wanted: int
    members: int
    """Of all classes together, training and validation."""
    crops: dict[str, int]
    """By split."""
    bytes: int
    """Size of the store."""
    seconds: dict[str, float]
    """By stage, over all runs; empty where the store was complete before."""
    fingerprint: str
    archive_checked: bool
    """Whether the archive is known to be the store's; False where the catalogue is missing."""


def summarise(
    path: Path, seconds: dict[str, float], *, already_complete: bool, archive_checked: bool
) -> Summary:
    """The summary of a complete store.

    seconds
        By stage.
    """
    store = PatchStore(path)
    members = (store.classes.neighbour, store.classes.validation_neighbour)
    return Summary(
        already_complete=already_complete,
        accepted=store.stages["survey"]["accepted"],
        rejected=store.stages["survey"]["rejected"],
        classes=store.num_classes,
        classes_wanted=store.config["classes"],
        members=sum(int((rows >= 0).sum()) for rows in members),
        crops={split: len(store.split(split)) for split in SPLITS},
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        seconds=seconds,
        fingerprint=store.fingerprint or "",
        archive_checked=archive_checked,
    )

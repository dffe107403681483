"""What a job made, as values and as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from store.format import SPLITS
from store.inspect import (
    Facts,
    describe_near_duplicates,
    format_counts,
    format_near_duplicates,
    format_size,
)
from store.progress import format_duration
from store.quality import MIXED_BELOW, Quality
from store.reader import PatchStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a finished job made."""

    store: Path
    already_complete: bool
    """Whether the store was complete before."""
    archive_checked: bool
    """Whether the store is known to be made from this archive; False without its catalogue."""
    accepted: int
    """Accepted scans."""
    rejected: dict[str, int]
    """Rejected series by reason."""
    near_duplicates: list[Facts] | None
    """Pairs of scans of different patients that are almost the same: ids, splits, similarity; None
    if they were not searched for."""
    too_small: int | None
    """Accepted scans in which no crop fits, which are in no class; None where it was not
    computed."""
    classes: int
    classes_wanted: int
    members: int
    """Scans of all classes, in both splits: one in two classes counts twice."""
    rejected_candidates: dict[str, int]
    """Scans that were tried as members of these classes and are none, by reason."""
    redrawn: dict[str, int]
    """Coordinates that were tried and did not become a class, by reason."""
    consistency: float | None
    """Median consistency of the classes; None where it was not computed."""
    mixed: int | None
    """Classes with a low consistency: their members may show different anatomy."""
    crops: dict[str, int]
    """Crops by split."""
    bytes: int
    """Size of the store."""
    seconds: dict[str, float]
    """Time by stage, over all runs of the job."""
    fingerprint: str

    def __str__(self) -> str:
        """Lines of text, for a terminal."""
        reasons = f" ({format_counts(self.rejected)})" if self.rejected else ""
        fewer = ""
        if self.classes < self.classes_wanted:
            fewer = f" of {self.classes_wanted} wanted: no further class fits the limits"
            if self.redrawn and max(self.redrawn, key=self.redrawn.__getitem__) == "overlap":
                fewer += " (most coordinates overlap another class; max_overlap allows more)"
        small = f"; {self.too_small} too small for the crops" if self.too_small else ""
        rejected = f"{sum(self.rejected.values())} rejected{reasons}"
        lines = [
            f"scans    {self.accepted} accepted, {rejected}{small}",
            *format_near_duplicates(self.near_duplicates or [], limit=3),
            f"classes  {self.classes}{fewer}; {self.members} members in all classes",
            *self._on_matching(),
            *self._on_quality(),
            f"crops    {self.crops['train']} train, {self.crops['validation']} validation;"
            f" {format_size(self.bytes)}",
            f"store    {self.store}, fingerprint {self.fingerprint[:16]}",
        ]
        if self.seconds:
            times = ", ".join(f"{name} {format_duration(s)}" for name, s in self.seconds.items())
            lines.insert(-1, f"time     {times}")
        if self.already_complete:
            lines.insert(0, f"{self.store} is complete; nothing to do.")
            if not self.archive_checked:
                lines[0] += (
                    " Whether it was made from this archive cannot be checked: its private"
                    " catalogue is missing or unreadable."
                )
        return "\n".join(lines)

    def _on_matching(self) -> list[str]:
        if not self.rejected_candidates and not self.redrawn:
            return []
        others = self.members - self.classes  # a reference is not matched
        tried = others + sum(self.rejected_candidates.values())
        text = f"matched  {others} of {tried} scans tried"
        if self.rejected_candidates:
            text += f"; rejected: {format_counts(self.rejected_candidates)}"
        if self.redrawn:
            text += f"; coordinates redrawn: {format_counts(self.redrawn)}"
        return [text]

    def _on_quality(self) -> list[str]:
        if self.consistency is None or self.mixed is None or self.classes < 2:
            return []  # a class is compared with others
        text = f"quality  consistency {self.consistency:.2f} (median of the classes)"
        if self.mixed:
            text += (
                f"; {self.mixed} of {self.classes} are below {MIXED_BELOW}: their members may show"
                f" different anatomy. `semgen classes {self.store} --quality` lists them"
            )
        return [text]


def summarise(
    path: str | Path,
    seconds: dict[str, float],
    *,
    already_complete: bool,
    archive_checked: bool,
    quality: list[Quality] | None = None,
    too_small: int | None = None,
) -> Summary:
    """The summary of a complete store.

    seconds
        By stage.
    quality
        Of all classes.
    too_small
        Number of accepted scans in which no crop fits.
    """
    store = PatchStore(path)
    members = (store.classes.neighbour, store.classes.validation_neighbour)
    discovered = store.stages["discover"]
    consistency = None if quality is None else [one.consistency for one in quality]
    return Summary(
        store=store.path,
        already_complete=already_complete,
        accepted=store.stages["survey"]["accepted"],
        rejected=store.stages["survey"]["rejected"],
        near_duplicates=describe_near_duplicates(store),
        too_small=too_small,
        classes=store.num_classes,
        classes_wanted=store.config["classes"],
        members=sum(int((rows >= 0).sum()) for rows in members),
        rejected_candidates=discovered.get("rejected", {}),  # not in stores of format 1
        redrawn=discovered.get("redrawn", {}),
        consistency=None if consistency is None else float(np.median(consistency)),
        mixed=None if consistency is None else sum(c < MIXED_BELOW for c in consistency),
        crops={split: len(store.split(split)) for split in SPLITS},
        bytes=sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        seconds=seconds,
        fingerprint=store.fingerprint or "",
        archive_checked=archive_checked,
    )

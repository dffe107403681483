"""What a job made, as values and as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from store.format import SPLITS
from store.inspect import format_counts, format_size
from store.progress import format_duration
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
    classes: int
    classes_wanted: int
    members: int
    """Scans of all classes, in both splits: one in two classes counts twice."""
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
        lines = [
            f"scans    {self.accepted} accepted, {sum(self.rejected.values())} rejected{reasons}",
            f"classes  {self.classes}{fewer}; {self.members} members in all classes",
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
                    " catalogue is missing, unreadable, or of an older version."
                )
        return "\n".join(lines)


def summarise(
    path: str | Path, seconds: dict[str, float], *, already_complete: bool, archive_checked: bool
) -> Summary:
    """The summary of a complete store.

    seconds
        By stage.
    """
    store = PatchStore(path)
    members = (store.classes.neighbour, store.classes.validation_neighbour)
    return Summary(
        store=store.path,
        already_complete=already_complete,
        accepted=store.stages["survey"]["accepted"],
        rejected=store.stages["survey"]["rejected"],
        classes=store.num_classes,
        classes_wanted=store.config["classes"],
        members=sum(int((rows >= 0).sum()) for rows in members),
        crops={split: len(store.split(split)) for split in SPLITS},
        bytes=sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        seconds=seconds,
        fingerprint=store.fingerprint or "",
        archive_checked=archive_checked,
    )

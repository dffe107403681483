"""Members of a class as NIfTI files, where they lie in the original scans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from pipeline.archive.lookup import has_catalogue, read_series
from pipeline.archive.series import Series
from store.atomic import fill_folder
from store.classes import check_class, read_annotation
from store.csvfile import write_csv_file
from store.errors import is_url
from store.format import SPLITS
from store.images import Rejected
from store.images.frame import ScanFrame, frame_of_file, frame_of_slices, write_crop
from store.progress import SILENT, Progress
from store.reader import PatchStore
from store.scans import scan_name

_COLUMNS: Final = ("file", "scan", "split", "scale", "distance", "score", "excluded", "origin")
_TABLE: Final = "members.csv"
_TOLERANCE_MM: Final = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassFiles:
    """What `export_class` wrote."""

    folder: str
    members: int
    files: int
    relative: int
    """Files whose positions are relative to the scan's first voxel."""

    def __str__(self) -> str:
        text = f"{self.folder}: {self.files} crops of {self.members} members, and members.csv"
        if self.relative:
            text += (
                f"\n{self.relative} of them without the original scan's geometry, because STORE"
                ".catalogue or the scan is not readable: positions are in mm from the centre of the"
                " scan's first voxel"
            )
        return text


@dataclass(frozen=True, slots=True)
class _Member:
    split: str
    scan: int
    distance: float
    score: float


def export_class(
    path: str | Path,
    label: int,
    out: Path,
    *,
    members: int | None = 20,
    all_scales: bool = False,
    progress: Progress = SILENT,
) -> ClassFiles:
    """Write crops of a class as NIfTI files into `out`, a new folder, with a table members.csv.

    Files are named by scan id. Their geometry is the scanner's if the private catalogue and the
    scans are readable, so that they lie over the scans in a viewer. Only headers of scans are read.

    members
        How many members to write: the reference, then those of either split nearest to it. None:
        all.
    all_scales
        Write the crops of all scales, not only the base crops.

    The files appear when all are written. Raises StoreError for a class that the store does not
    have, SemgenError when `out` is not empty.
    """
    store = PatchStore(path)
    check_class(label, store.num_classes, where=store.location)
    chosen = _list_members(store, label)[:members]
    excluded = read_annotation(store.location)[label].excluded_members
    lines: list[tuple[object, ...]] = []
    frames = _read_frames(store, [member.scan for member in chosen])
    with (
        fill_folder(out, last=_TABLE) as folder,
        progress.stage("export", len(chosen), "members") as advance,
    ):
        for member, frame in zip(chosen, frames, strict=True):
            split, scan = store.split(member.split), scan_name(store.scans.id[member.scan])
            rows = store.rows(member.split, label, None if all_scales else 0)
            for row in rows[split.scan[rows] == member.scan]:
                scale = int(split.scale[row])
                name = "reference-" * (not lines) + scan + f"-scale{scale}" * (scale > 0)
                write_crop(
                    folder / f"{name}.nii.gz",
                    split.read([row])[0],
                    origin_mm=split.origin_mm[row],
                    extent_mm=split.extent_mm[row],
                    frame=frame,
                )
                lines.append(
                    (f"{name}.nii.gz", scan, member.split, scale, round(member.distance, 6),
                     None if np.isnan(member.score) else round(member.score, 4),
                     str(member.scan in excluded).lower(), "scanner" if frame else "first voxel")
                )  # fmt: skip
            advance(1)
        write_csv_file(folder / _TABLE, _COLUMNS, lines)
    return ClassFiles(
        folder=str(out),
        members=len(chosen),
        files=len(lines),
        relative=sum(line[-1] == "first voxel" for line in lines),
    )


def _list_members(store: PatchStore, label: int) -> list[_Member]:
    """The members of both splits: the reference, then the nearest first."""
    found = []
    for split in SPLITS:
        members = store.members(label, split)
        columns = (members.scans, members.distances, members.scores)
        found += [
            _Member(split, *values)
            for values in zip(*(column.tolist() for column in columns), strict=True)
        ]
    reference = int(store.classes.reference[label])
    return sorted(found, key=lambda member: (member.scan != reference, member.distance))


def _read_frames(store: PatchStore, scans: list[int]) -> Iterator[ScanFrame | None]:
    """The frame of each scan; None where the catalogue or the scan's files cannot be read."""
    if is_url(store.location) or not has_catalogue(store.path):
        yield from [None] * len(scans)
        return
    for scan, series in zip(scans, read_series(store.path, scans), strict=True):
        frame = _read_frame(series)
        if frame is not None and not _fits(frame, store, scan):
            frame = None  # another scan is there now
        yield frame


def _read_frame(series: Series) -> ScanFrame | None:
    try:
        if series.kind != "dicom":
            return frame_of_file(Path(series.files[0]))
        assert series.slice_gap_mm is not None
        return frame_of_slices(series.files, series.slice_gap_mm)
    except (Rejected, OSError, RuntimeError):
        return None


def _fits(frame: ScanFrame, store: PatchStore, scan: int) -> bool:
    """Whether size and spacing are those of the scan when the store was prepared."""
    apart = np.abs(np.subtract(frame.spacing_mm, store.scans.spacing_mm[scan]))
    return frame.size == tuple(store.scans.size[scan]) and bool(apart.max() < _TOLERANCE_MM)

"""Find series in an archive and read their headers; no voxel is read here.

DICOM headers are read with pydicom, one folder at a time; the slice positions are checked
against an even grid, because reading libraries silently return a wrong spacing otherwise.
Volumetric files (NIfTI, MetaImage, NRRD) are listed by name; their headers are read by the
worker that reads the voxels, since a malformed one can crash the reading library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pydicom
import pydicom.config
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from store.errors import SemgenError

# pydicom's warnings quote header text, which must not reach a terminal or a log
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module=r"pydicom\..*")

VOLUME_SUFFIXES: Final = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
_DICOM_SUFFIXES: Final = (".dcm", ".dicom", ".ima")
_TAGS: Final = [
    "Columns",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "Rows",
    "SamplesPerPixel",
    "SeriesInstanceUID",
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
]
_SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"  # and its kinds, by prefix
CRASHED: Final = "reader crashed"
"""Reason of a series whose reading killed its process, or had to be stopped."""
_DUPLICATE_MM: Final = 1e-3
_TILT_MM: Final = 1.0
_ORIENTATION_TOLERANCE: Final = 1e-3
OF_PARTS: Final = ("too few slices", "missing slices", "uneven slice spacing")
"""Reasons that may vanish when the slices of other folders join a series."""
_OF_WHOLES: Final = ("missing slices", "too large")
JOINED: Final = "joined"
"""Reason of a series whose slices belong to the same series in another folder."""
DUPLICATE: Final = "duplicate"


class ArchiveError(SemgenError):
    """The archive as a whole cannot be read as asked."""


class Rejected(Exception):
    """A series that cannot be used.

    `reason` is a fixed word of the rule, safe to show anywhere; `detail` says what was found
    and stays in the private catalogue.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One series as found: its files in slice order, and what its headers say.

    `reason` and `detail` are set when the headers alone reject it. `patient` and `study` are
    opaque words that scans of one person, series of one study share; so is `uid` for the parts
    of one DICOM series that lies in several folders. `split` (0 train, 1 validation) is set where
    a manifest says so. `stamp` changes with the files' sizes and times; it is empty where more
    files belong to the series than are listed.
    """

    key: str
    kind: str
    files: tuple[str, ...]
    patient: str
    study: str = ""
    uid: str = ""
    axial: bool = True
    slice_gap_mm: float | None = None
    split: int | None = None
    stamp: str = ""
    reason: str | None = None
    detail: str = ""

    def __repr__(self) -> str:
        return f"<Series {self.key}: {self.kind}, {len(self.files)} files>"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Slice:
    """What one DICOM header says."""

    path: str
    instance: str
    series: str
    study: str
    patient: str
    kind: str
    modality: str
    scout: bool
    samples: int
    frames: int
    rows: int
    columns: int
    position_mm: tuple[float, ...]
    axes: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Folder:
    """Files of one folder that may hold scans; `origin` is its place in the archive."""

    origin: str
    path: str
    files: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Folder: {len(self.files)} files>"


def find_folders(archive: Sequence[Path]) -> Iterator[Folder]:
    """Folders below the given folders and files, in a stable order; links are not followed.

    Raises ArchiveError when one of them does not exist.
    """
    for number, root in enumerate(archive):
        if root.is_file():
            yield Folder(str(number), str(root.parent), (root.name,))
        elif root.is_dir():
            for path, folders, files in os.walk(root):
                folders.sort()
                if files:
                    origin = f"{number}/{Path(path).relative_to(root).as_posix()}"
                    yield Folder(origin, path, tuple(sorted(files)))
        else:
            raise ArchiveError(f"{root}: no such file or folder")


def read_folder(folder: Folder, config: PrepareConfig) -> list[Series]:
    """Every series of one folder. Files that claim to be no image are passed over."""
    found: list[Series] = []
    series: dict[str, list[_Slice]] = {}
    for name in folder.files:
        path = os.path.join(folder.path, name)
        if _is_special(path):
            continue
        if name.lower().endswith(VOLUME_SUFFIXES):
            found.append(_file_series(folder, name, path))
        elif _looks_like_dicom(path):
            try:
                header = _read_header(path)
            except Rejected as rejected:
                found.append(_file_series(folder, name, path, kind="dicom", rejected=rejected))
            else:
                series.setdefault(header.series or name, []).append(header)
    for uid, slices in sorted(series.items()):
        found.append(_dicom_series(folder, uid, slices, config))
    return found


def crashed_folder(folder: Folder) -> Series:
    """What to note for a folder whose headers crash the reading library."""
    return _file_series(
        folder,
        folder.files[0],
        os.path.join(folder.path, folder.files[0]),
        kind="dicom",
        rejected=Rejected(CRASHED, "one of the folder's files, or reading took too long"),
    )


def _file_series(
    folder: Folder, name: str, path: str, kind: str = "file", rejected: Rejected | None = None
) -> Series:
    key = _key(folder.origin, name)
    series = Series(key=key, kind=kind, files=(path,), patient=key, study=key)
    if rejected is not None:
        return dataclasses.replace(series, reason=rejected.reason, detail=rejected.detail)
    alone = not name.lower().endswith((".mhd", ".nhdr"))  # their voxels lie in another file
    return dataclasses.replace(series, stamp=_stamp((path,)) if alone else "")


def _key(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _stamp(files: Sequence[str]) -> str:
    try:
        found = [os.stat(file) for file in sorted(files)]
    except OSError:  # reading will tell why
        return ""
    return _key(*(f"{one.st_size} {one.st_mtime_ns}" for one in found))


def _is_special(path: str) -> bool:
    """A pipe, socket or device: opening it may wait for ever."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # reading will tell why
        return False


def _looks_like_dicom(path: str) -> bool:
    if path.lower().endswith(_DICOM_SUFFIXES):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _read_header(path: str) -> _Slice:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=True)
        if "SOPClassUID" not in header and "Modality" not in header:
            raise Rejected("unreadable", "no DICOM header")
        if "Rows" not in header or "Columns" not in header:
            raise Rejected("not an image", f"modality {header.get('Modality')}")
        return _Slice(
            path=path,
            instance=str(header.get("SOPInstanceUID") or path),
            series=str(header.get("SeriesInstanceUID") or ""),
            study=str(header.get("StudyInstanceUID") or ""),
            patient=str(header.get("PatientID") or "").strip(),
            kind=str(header.get("SOPClassUID") or ""),
            modality=str(header.get("Modality") or ""),
            scout="LOCALIZER" in (header.get("ImageType") or ()),
            samples=int(header.get("SamplesPerPixel") or 1),
            frames=int(header.get("NumberOfFrames") or 1),
            rows=int(header.Rows or 0),
            columns=int(header.Columns or 0),
            position_mm=tuple(float(v) for v in header.get("ImagePositionPatient") or ()),
            axes=tuple(float(v) for v in header.get("ImageOrientationPatient") or ()),
        )
    except Rejected:
        raise
    except Exception as error:  # pydicom raises whatever a malformed element makes it stumble over
        raise Rejected("unreadable", type(error).__name__) from error


def join_parts(parts: Sequence[Series], config: PrepareConfig) -> list[Series]:
    """What becomes of the parts of one DICOM series that lies in several folders.

    The first one takes the slices of all; a part that brings no slice of its own is a duplicate.
    Parts that do not make one scan (other scans under the same number) stay as they are.
    """
    slices: dict[str, _Slice] = {}
    rest = []
    for part in parts:
        try:
            headers = {one.instance: one for one in map(_read_header, part.files)}
        except Rejected:  # it was readable a moment ago: leave all as it is
            return list(parts)
        new = {name: one for name, one in headers.items() if name not in slices}
        told = (JOINED, "to the series in another folder") if new else (DUPLICATE, "of its slices")
        rest.append(dataclasses.replace(part, reason=told[0], detail=told[1]))
        slices |= new
    whole = _judge(parts[0], list(slices.values()), config)
    return [whole, *rest[1:]] if whole.reason in (None, *_OF_WHOLES) else list(parts)


def _dicom_series(folder: Folder, uid: str, slices: list[_Slice], config: PrepareConfig) -> Series:
    first, key = slices[0], _key(folder.origin, uid)
    series = Series(
        key=key,
        kind="dicom",
        files=(),
        patient=person_key(first.patient) if first.patient else key,
        study=_key("study", first.study) if first.study else key,
        uid=_key("series", first.patient, first.study, first.series) if first.series else "",
    )
    return _judge(series, slices, config)


def _judge(series: Series, slices: list[_Slice], config: PrepareConfig) -> Series:
    """The series with these slices in their order, or with the reason against it."""
    files = tuple(one.path for one in slices)
    try:
        order, gap_mm = _check_slices(slices, config)
    except Rejected as no:
        return dataclasses.replace(series, files=files, reason=no.reason, detail=no.detail)
    return dataclasses.replace(
        series,
        files=tuple(files[i] for i in order),
        axial=_is_axial(slices[0], config),
        stamp=_stamp(files),
        slice_gap_mm=gap_mm,
        reason=None,
        detail="",
    )


def person_key(patient: str) -> str:
    """The opaque word for a PatientID."""
    return _key("patient", patient)


def _is_axial(one: _Slice, config: PrepareConfig) -> bool:
    normal = np.cross(one.axes[:3], one.axes[3:])
    return abs(float(normal[2])) >= math.cos(math.radians(config.max_oblique_deg))


def _check_slices(slices: list[_Slice], config: PrepareConfig) -> tuple[list[int], float]:
    """Slice order along the normal and the gap in mm; Rejected by the first rule that fails."""
    first = slices[0]
    size = (len(slices), first.rows, first.columns)
    if first.modality != "CT":
        raise Rejected("not CT", f"modality {first.modality}")
    if first.scout:
        raise Rejected("scout")
    if first.kind.startswith(_SECONDARY_CAPTURE):
        raise Rejected("secondary capture")
    if first.samples != 1:
        raise Rejected("RGB or vector")
    if any(one.frames > 1 for one in slices):
        raise Rejected("multi-frame")
    if len({(one.rows, one.columns) for one in slices}) > 1:
        raise Rejected("mixed slice sizes")
    if min(size) < config.min_slices:
        raise Rejected("too few slices", f"size {size}")
    if math.prod(size) > config.max_voxels:
        raise Rejected("too large", f"size {size}")
    if any(len(one.position_mm) != 3 or len(one.axes) != 6 for one in slices):
        raise Rejected("no slice positions")
    position = np.array([one.position_mm for one in slices])
    axes = np.array([one.axes for one in slices])
    if not (np.isfinite(position).all() and np.isfinite(axes).all()):
        raise Rejected("no slice positions", "values that are not finite")
    if np.abs(axes - axes[0]).max() > _ORIENTATION_TOLERANCE:
        raise Rejected("mixed orientations")
    return check_positions(position, axes[0], config.spacing_tolerance)


def check_positions(
    position_mm: NDArray[np.float64], axes: NDArray[np.float64], tolerance: float
) -> tuple[list[int], float]:
    """Order slices along their normal and verify that they stand on an even, straight grid.

    position_mm
        (n, 3) ImagePositionPatient, DICOM's x, y, z.
    axes
        (6,) ImageOrientationPatient: row and column direction.
    tolerance
        Largest distance of a slice from its place on the even grid, as a share of the gap.

    Returns the order and the mean gap in mm. Raises Rejected.
    """
    normal = np.cross(axes[:3], axes[3:])
    along = position_mm @ normal
    order = np.argsort(along, kind="stable")
    along = along[order]
    gaps = np.diff(along)
    if gaps.min() < _DUPLICATE_MM:
        raise Rejected("slices at one position")
    gap = float(along[-1] - along[0]) / (len(along) - 1)
    off_grid = np.abs(along - (along[0] + gap * np.arange(len(along)))).max() / gap
    if off_grid > tolerance:
        usual = float(np.median(gaps))
        multiples = gaps / usual
        if np.abs(multiples - np.rint(multiples)).max() <= tolerance:
            raise Rejected("missing slices", f"gaps up to {gaps.max():.3f} mm, usual {usual:.3f}")
        raise Rejected("uneven slice spacing", f"gaps {gaps.min():.3f} to {gaps.max():.3f} mm")
    drift = position_mm[order[-1]] - position_mm[order[0]]
    shear = float(np.linalg.norm(drift - normal * (along[-1] - along[0])))
    if shear > _TILT_MM:
        raise Rejected("gantry tilt", f"slices shift by {shear:.1f} mm over the scan")
    return [int(i) for i in order], gap

"""Find series in an archive and read their headers; no voxel is read here.

DICOM headers are read one folder at a time. Volumetric files (NIfTI, MetaImage, NRRD) are listed
by name; their headers are read by the worker that reads the voxels, since a malformed one can
crash the reading library. What cannot be looked into is listed, too, with the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import stat
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from pipeline.config import PrepareConfig
from store.errors import SemgenError
from store.images import Rejected
from store.images.slices import SUFFIXES, Slice, looks_like_dicom, order_slices, read_header

VOLUME_SUFFIXES: Final = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
_COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst")
_PACKED: Final = (".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz")
_DIRECTORY: Final = "DICOMDIR"
"""A DICOM file that lists others and holds no image."""
_SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"  # and its kinds, by prefix
CRASHED: Final = "reader crashed"
"""Reason of a series whose reading killed its process, or had to be stopped."""
INTERNAL: Final = "internal error"
"""Reason of a series that met a fault of ours; the detail is its traceback."""
OF_PARTS: Final = ("too few slices", "missing slices", "uneven slice spacing")
"""Reasons that may vanish when the slices of other folders join a series."""
_OF_WHOLES: Final = ("missing slices", "too large")
JOINED: Final = "joined"
"""Reason of a series whose slices belong to the same series in another folder."""
DUPLICATE: Final = "duplicate"


class ArchiveError(SemgenError):
    """The archive as a whole cannot be read as asked."""


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


@dataclasses.dataclass(frozen=True, slots=True)
class Folder:
    """Files of one folder that may hold scans; `origin` is its place in the archive.

    `error` says why the folder cannot be listed; it has no files then.
    """

    origin: str
    path: str
    files: tuple[str, ...]
    error: str = ""

    def __repr__(self) -> str:
        return f"<Folder: {len(self.files)} files>"


def find_folders(archive: Sequence[Path]) -> Iterator[Folder]:
    """Folders below the given folders and files, in a stable order.

    A linked folder is followed where it leads out of the archive, each target once; what lies in
    the archive is found without the link. Raises ArchiveError when one of `archive` does not exist.
    """
    known = {os.path.realpath(root) for root in archive}  # and the targets of followed links
    for number, root in enumerate(archive):
        if root.is_file():
            yield Folder(str(number), str(root.parent), (root.name,))
        elif root.is_dir():
            for path, files, error in _walk(str(root), known):
                origin = f"{number}/{Path(path).relative_to(root).as_posix()}"
                if files or error:
                    yield Folder(origin, path, files, error)
        else:
            raise ArchiveError(f"{root}: no such file or folder")


def _walk(root: str, known: set[str]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(folder, names of its files, why it cannot be listed) of a folder and all below it."""
    waiting = [(root, False)]
    while waiting:
        path, below_link = waiting.pop()
        try:
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            yield path, (), error.strerror or type(error).__name__
            continue
        folders, files = [], []
        for entry in entries:
            if not _is_folder(entry):
                files.append(entry.name)
            elif entry.is_symlink():
                if _leads_elsewhere(entry.path, known):
                    folders.append((entry.path, True))
            elif not (below_link and os.path.realpath(entry.path) in known):
                folders.append((entry.path, below_link))
        yield path, tuple(files), ""
        waiting += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead in a circle; reading will tell
        return False


def _leads_elsewhere(link: str, known: set[str]) -> bool:
    """Whether what a link leads to is found by no other way; from then on it is known."""
    target = Path(os.path.realpath(link))
    if not known.isdisjoint(map(str, (target, *target.parents))):
        return False
    known.add(str(target))
    return True


def read_folder(folder: Folder, config: PrepareConfig) -> list[Series]:
    """Every series of one folder. Files that claim to be no image are passed over."""
    if folder.error:
        return [_file_series(folder, "", Rejected("folder not readable", folder.error))]
    found: list[Series] = []
    series: dict[str, list[Slice]] = {}
    for name in folder.files:
        path = os.path.join(folder.path, name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                continue  # a pipe or device: opening it may wait for ever
            if name.lower().endswith(VOLUME_SUFFIXES):
                found.append(_file_series(folder, name))
            elif _is_packed(name.lower()):
                raise Rejected("packed archive", "unpack it")
            elif name != _DIRECTORY and looks_like_dicom(path):
                header = read_header(path)
                series.setdefault(header.series or name, []).append(header)
        except Rejected as rejected:
            found.append(_file_series(folder, name, rejected))
        except OSError as error:
            reason = "broken link" if os.path.islink(path) else "file not readable"
            no = Rejected(reason, error.strerror or type(error).__name__)
            found.append(_file_series(folder, name, no))
    for uid, slices in sorted(series.items()):
        found.append(_dicom_series(folder, uid, slices, config))
    return found


def _is_packed(name: str) -> bool:
    inner, suffix = os.path.splitext(name)
    packed = (*_PACKED, *VOLUME_SUFFIXES, *SUFFIXES)
    return name.endswith(_PACKED) or (suffix in _COMPRESSED and inner.endswith(packed))


def crashed_folder(folder: Folder) -> Series:
    """What to note for a folder whose headers crash the reading library."""
    rejected = Rejected(CRASHED, "one of the folder's files, or reading took too long")
    return _file_series(folder, folder.files[0], rejected)


def _file_series(folder: Folder, name: str, rejected: Rejected | None = None) -> Series:
    """A series of one file, or what to note instead of it."""
    key, path = _key(folder.origin, name), os.path.join(folder.path, name)
    series = Series(key=key, kind="file", files=(path,), patient=key, study=key)
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


def join_parts(parts: Sequence[Series], config: PrepareConfig) -> list[Series]:
    """What becomes of the parts of one DICOM series that lies in several folders.

    The first one takes the slices of all; a part that brings no slice of its own is a duplicate.
    Parts that do not make one scan (other scans under the same number) stay as they are.
    """
    slices: dict[str, Slice] = {}
    rest = []
    for part in parts:
        try:
            headers = {one.instance: one for one in map(read_header, part.files)}
        except Rejected:  # it was readable a moment ago: leave all as it is
            return list(parts)
        new = {name: one for name, one in headers.items() if name not in slices}
        told = (JOINED, "to the series in another folder") if new else (DUPLICATE, "of its slices")
        rest.append(dataclasses.replace(part, reason=told[0], detail=told[1]))
        slices |= new
    whole = _judge(parts[0], list(slices.values()), config)
    return [whole, *rest[1:]] if whole.reason in (None, *_OF_WHOLES) else list(parts)


def _dicom_series(folder: Folder, uid: str, slices: list[Slice], config: PrepareConfig) -> Series:
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


def _judge(series: Series, slices: list[Slice], config: PrepareConfig) -> Series:
    """The series with these slices in their order, or with the reason against it."""
    files = tuple(one.path for one in slices)
    try:
        order, gap_mm = _check_slices(slices, config)
    except Rejected as no:
        return dataclasses.replace(series, files=files, reason=no.reason, detail=no.detail)
    except Exception:  # a bug: it costs this series, not the job
        detail = traceback.format_exc()
        return dataclasses.replace(series, files=files, reason=INTERNAL, detail=detail)
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


def _is_axial(one: Slice, config: PrepareConfig) -> bool:
    normal = np.cross(one.axes[:3], one.axes[3:])
    return abs(float(normal[2])) >= math.cos(math.radians(config.max_oblique_deg))


def _check_slices(slices: list[Slice], config: PrepareConfig) -> tuple[list[int], float]:
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
    if min(size) < config.min_slices:
        raise Rejected("too few slices", f"size {size}")
    if math.prod(size) > config.max_voxels:
        raise Rejected("too large", f"size {size}")
    return order_slices(slices, config.spacing_tolerance)

"""Read the headers of an archive's folders: which series there are; no voxel is read here.

DICOM headers are read one folder at a time. Volumetric files (NIfTI, MetaImage, NRRD) are listed
by name; their headers are read one by one (by the survey, or for a dry run), since a malformed one
can crash the reading library. Files and folders that cannot be read are listed, too, with the
reason.
"""

from __future__ import annotations

import dataclasses
import math
import os
import stat
import struct
import traceback
from collections.abc import Sequence
from typing import Final

import numpy as np

from pipeline.archive.folders import Folder
from pipeline.archive.series import (
    DUPLICATE,
    INTERNAL,
    JOINED,
    Series,
    hash_words,
    patient_key,
)
from pipeline.config import PrepareConfig
from store.images import HEADER_SUFFIXES, VOLUME_SUFFIXES, Rejected, check_fetched
from store.images.slices import (
    DICOM_SUFFIXES,
    Slice,
    is_rescaled_alike,
    looks_like_dicom,
    order_slices,
    read_header,
)

_COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst", ".z", ".lzma", ".lz4")
_PACKED: Final = (".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz")
_MAX_POINTER_BYTES: Final = 1024
"""Pointers of Git LFS have about 130 bytes; larger files than this are not checked."""
_DIRECTORY: Final = "DICOMDIR"
"""A DICOM file that lists others and contains no image."""
_SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"  # and its kinds, by prefix
_JOINED_TEXT: Final = "its slices were added to the series in another folder"
_DUPLICATE_TEXT: Final = "all its slices are in another folder"
_ACCEPTED_AFTER_JOIN: Final = ("missing slices", "too large")
"""A series rejected for one of these is still one scan; for another reason its parts stay apart."""


def read_folder(folder: Folder, config: PrepareConfig) -> list[Series]:
    """Every series of one folder. Files that are no images by name and content are ignored."""
    if folder.rejected:
        return [_file_series(folder, "", folder.rejected)]
    listed: list[Series] = []
    series: dict[str, list[Slice]] = {}
    for name in folder.files:
        path = os.path.join(folder.path, name)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("file not readable", "a pipe or device")  # opening it may block
            if status.st_size < _MAX_POINTER_BYTES:
                check_fetched(path)
            if name.lower().endswith(VOLUME_SUFFIXES):
                listed.append(_file_series(folder, name))
            elif _is_packed(name.lower()):
                raise Rejected("packed archive", "unpack it")
            elif name.lower().endswith(".hdr") and _is_pair_header(path):
                raise Rejected("NIfTI pair", "convert its two files to one .nii.gz")
            elif name != _DIRECTORY and looks_like_dicom(path):
                header = read_header(path)
                series.setdefault(header.series or name, []).append(header)
        except Rejected as rejected:
            listed.append(_file_series(folder, name, rejected))
        except OSError as error:
            reason = "broken link" if os.path.islink(path) else "file not readable"
            detail = error.strerror or type(error).__name__
            listed.append(_file_series(folder, name, Rejected(reason, detail)))
    for uid, slices in sorted(series.items()):
        listed.append(_dicom_series(folder, uid, slices, config))
    return listed


def _is_packed(name: str) -> bool:
    """Whether a name (in lower case) is that of an archive, or of a packed image.

    Names of DICOM files often have no suffix, or end with the last number of a UID.
    """
    inner, suffix = os.path.splitext(name)
    kind = os.path.splitext(inner)[1]
    images = (*_PACKED, *VOLUME_SUFFIXES, *DICOM_SUFFIXES, ".hdr", ".img")
    is_image = inner.endswith(images) or not kind or kind[1:].isdigit()
    return name.endswith(_PACKED) or (suffix in _COMPRESSED and is_image)


def _is_pair_header(path: str) -> bool:
    """Whether a file begins like the header of a NIfTI pair, or of Analyze."""
    with open(path, "rb") as file:
        return file.read(4) in {struct.pack(f"{o}i", n) for o in "<>" for n in (348, 540)}


def crashed_folder(folder: Folder, reason: str) -> Series:
    """A rejected series for a folder whose headers end the process that reads them."""
    rejected = Rejected(reason, "one of the folder's files")
    return _file_series(folder, folder.files[0], rejected)


def _file_series(folder: Folder, name: str, rejected: Rejected | None = None) -> Series:
    """A series of one file, rejected where `rejected` is given."""
    key, path = hash_words(folder.origin, name), os.path.join(folder.path, name)
    series = Series(key=key, kind="file", files=(path,), patient=key, study=key)
    if rejected is not None:
        return dataclasses.replace(series, reason=rejected.reason, detail=rejected.detail)
    alone = not name.lower().endswith(HEADER_SUFFIXES)
    return dataclasses.replace(series, stamp=_stamp((path,)) if alone else "")


def _stamp(files: Sequence[str]) -> str:
    try:
        stats = [os.stat(file) for file in sorted(files)]
    except OSError:  # reading it will give the reason
        return ""
    return hash_words(*(f"{one.st_size} {one.st_mtime_ns}" for one in stats))


def join_parts(parts: Sequence[Series], config: PrepareConfig) -> list[Series]:
    """Join the parts of one DICOM series that lies in several folders.

    The first part gets the slices of all; a part whose slices are all known is a duplicate. Parts
    that do not make one scan (different scans under one UID) stay as they are.
    """
    slices: dict[str, Slice] = {}
    rest = []
    for part in parts:
        try:
            headers = {one.instance: one for one in map(read_header, part.files)}
        except Rejected:  # it was readable a moment ago: leave all as it is
            return list(parts)
        new = {name: one for name, one in headers.items() if name not in slices}
        reason, detail = (JOINED, _JOINED_TEXT) if new else (DUPLICATE, _DUPLICATE_TEXT)
        rest.append(dataclasses.replace(part, reason=reason, detail=detail))
        slices |= new
    first = _check(parts[0], list(slices.values()), config)
    return [first, *rest[1:]] if first.reason in (None, *_ACCEPTED_AFTER_JOIN) else list(parts)


def _dicom_series(folder: Folder, uid: str, slices: list[Slice], config: PrepareConfig) -> Series:
    first, key = slices[0], hash_words(folder.origin, uid)
    study = hash_words("study", first.study) if first.study else key
    series = Series(
        key=key,
        kind="dicom",
        files=(),
        patient=patient_key(first.patient) if first.patient else study,
        study=study,
        uid=hash_words("series", first.patient, first.study, first.series) if first.series else "",
    )
    return _check(series, slices, config)


def _check(series: Series, slices: list[Slice], config: PrepareConfig) -> Series:
    """The series with these slices in order, or with the reason why it is rejected."""
    files = tuple(one.path for one in slices)
    try:
        order, gap_mm = _check_slices(slices, config)
    except Rejected as rejected:
        return dataclasses.replace(
            series, files=files, reason=rejected.reason, detail=rejected.detail
        )
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


def _is_axial(one: Slice, config: PrepareConfig) -> bool:
    normal = np.cross(one.axes[:3], one.axes[3:])
    return abs(float(normal[2])) >= math.cos(math.radians(config.max_oblique_deg))


def _check_slices(slices: list[Slice], config: PrepareConfig) -> tuple[list[int], float]:
    """Slice order along the normal and the gap in mm; Rejected by the first rule that fails."""
    first = slices[0]
    size = (len(slices), first.rows, first.columns)
    other = {one.modality for one in slices} - {"CT"}
    if other:
        raise Rejected("not CT", f"modality {', '.join(sorted(other))}")
    if first.scout:
        raise Rejected("scout")
    if first.kind.startswith(_SECONDARY_CAPTURE):
        raise Rejected("secondary capture")
    if any(one.samples != 1 for one in slices):
        raise Rejected("RGB or vector")
    if any(0 < one.bits <= 8 for one in slices):
        raise Rejected("not in HU", "8-bit values")
    if any(one.frames > 1 for one in slices):
        raise Rejected("multi-frame")
    if min(size) < config.min_slices:
        raise Rejected("too few slices", f"size {size}")
    if math.prod(size) > config.max_voxels:
        raise Rejected("too large", f"size {size}")
    if not is_rescaled_alike(slices):
        raise Rejected("mixed rescaling", "the slices differ in slope, or some have none")
    return order_slices(slices, config.spacing_tolerance)
